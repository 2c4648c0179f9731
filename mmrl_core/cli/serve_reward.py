"""`mmrl serve-reward NAME`: any installed reward behind HTTP, for the reward `remote` of other processes."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path

from mmrl_core.cli.arguments import positive
from mmrl_core.errors import PluginError, RewardError
from mmrl_core.plugins import Found, Selected, load_plugins
from mmrl_core.recipe import DEFAULT_DEADLINE_S
from mmrl_core.yaml_source import RecipeSource

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "serve-reward",
        help="run a reward as a service that recipes use through `remote`",
        description="Run one installed reward in a process of its own and answer over HTTP: GET /health, POST /score. "
        "Requests that wait together are scored together. SIGTERM or Ctrl-C ends it once what waits is answered.",
        epilog="Exit status: 0 after a clean stop, 1 when the reward cannot be set up or is gone. There is no "
        "encryption and no password: listen on addresses that only your own machines reach.",
    )
    parser.add_argument("reward", metavar="NAME", help="the reward's word, as in a recipe: see `mmrl plugins`")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="the reward's options, as in a recipe")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all of them")
    parser.add_argument("--port", type=_port, default=8765, help="port to listen on; 0: any free one, which is printed")
    parser.add_argument("--device", default="cpu", help="torch device string on which the reward computes")
    parser.add_argument("--batch-size", type=positive, metavar="N", help="samples a call; by default the reward's own")
    parser.add_argument(
        "--deadline",
        type=_seconds,
        default=DEFAULT_DEADLINE_S,
        metavar="SECONDS",
        help="seconds one batch may take before its process is killed and replaced",
    )
    parser.add_argument("--queue", type=positive, default=64, metavar="N", help="requests that may wait; then 503")
    parser.add_argument(
        "--max-request-mb", type=positive, default=256, metavar="N", help="largest body of a request, in MiB"
    )
    parser.add_argument(
        "--offload", action="store_true", help="release the device's memory whenever nothing waits (a shared device)"
    )
    parser.add_argument(
        "--grace", type=_seconds, default=30.0, metavar="SECONDS", help="seconds to answer what waits when told to stop"
    )
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve until told to stop."""
    from mmrl_core.rewards.http_service import RewardServer
    from mmrl_core.rewards.service import RewardService

    service = RewardService(
        _selected(arguments),
        arguments.device,
        deadline_s=arguments.deadline,
        waiting=arguments.queue,
        batch_size=arguments.batch_size,
        offload=arguments.offload,
    )
    try:
        server = RewardServer(
            (arguments.host, arguments.port),
            service,
            deadline_s=arguments.deadline,
            waiting=arguments.queue,
            max_bytes=arguments.max_request_mb << 20,
        )
    except OSError as error:
        raise RewardError(
            f"cannot listen on {arguments.host} port {arguments.port}: {error}. Choose another --port"
        ) from error
    found = service.identity
    told = threading.Event()
    before = {number: signal.signal(number, lambda *_: told.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    if arguments.host not in LOOPBACK:
        print(f"mmrl: anybody who reaches {arguments.host} can use this service", file=sys.stderr, flush=True)
    listening = threading.Thread(target=server.serve_forever, name="mmrl-reward-http", daemon=True)
    try:
        service.start()
        listening.start()
        what = f"reward {found['reward']!r} of {found['distribution']} {found['version']}"
        print(f"mmrl: {what} on {server.url}", flush=True)
        said = False
        while not told.wait(0.1) and not service.ended.is_set():
            if not said and service.status == "ready":
                said = True
                print("mmrl: ready", flush=True)
    finally:
        service.stop(arguments.grace)
        server.finish(2.0)
        server.shutdown()
        server.server_close()
        for number, handler in before.items():
            signal.signal(number, handler)
    if service.error is not None:
        raise service.error
    print(f"mmrl: stopped after {service.health()['requests']} requests", flush=True)
    return 0


def _selected(arguments: argparse.Namespace) -> Selected:
    found: Found = load_plugins().get("reward", arguments.reward)
    probe = found.probe()
    if not probe.available:
        cure = f" Cure: {probe.cure}" if probe.cure else ""
        raise PluginError(f"reward {found.name!r} ({found.distribution}) cannot run here: {probe.reason}.{cure}")
    source = RecipeSource.of_overrides(Path("mmrl serve-reward"), arguments.overrides)
    return Selected(found=found, options=found.validate(source, source.data, ()))


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text} is not a port")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return value
