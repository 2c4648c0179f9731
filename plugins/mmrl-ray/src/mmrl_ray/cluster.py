"""Joins a Ray cluster, or starts one on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray

from mmrl_core.errors import PreflightError

_REACH_S = 5.0
_ANSWER_S = 30.0
_OBJECT_STORE_BYTES = 80 * 2**20
"""Ray's smallest, nearly: the launcher keeps no objects."""
_CURRENT = Path("ray") / "ray_current_cluster"
"""Below Ray's temporary folder: the file in which `ray start` leaves the address."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node of the cluster."""

    id: str
    address: str
    resources: Mapping[str, float]
    alive: bool


@contextmanager
def connected(address: str | None, local_devices: Mapping[str, int], local_cpus: int) -> Iterator[str]:
    """Inside the block this process is a driver of the cluster; yields the cluster's name for messages.

    Args:
        address: as the option says.
        local_devices: resources (other than CPU) of a cluster that is started here.
        local_cpus: CPUs that such a cluster offers; ranks may share cores.

    Raises PreflightError when there is no cluster at `address` or it does not take this process.
    """
    if ray.is_initialized():
        yield "that this process is connected to"
        return
    wanted = address or os.environ.get("RAY_ADDRESS")
    try:
        if wanted is None or wanted == "local":
            name = "on this machine"
            _start_here(local_devices, local_cpus)
        else:
            name = _reach(wanted)
            _join(name)
        yield name
    finally:
        ray.shutdown()


def nodes() -> list[Node]:
    """The nodes that ever were, in an order that does not change."""
    found = [
        Node(id=n["NodeID"], address=n["NodeManagerAddress"], resources=n["Resources"], alive=n["Alive"])
        for n in ray.nodes()
    ]
    return sorted(found, key=lambda node: (node.address, node.id))


def living() -> list[Node]:
    """Those of `nodes` that are there now."""
    return [node for node in nodes() if node.alive]


def _start_here(devices: Mapping[str, int], cpus: int) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # else ranks get what others leave
    own = dict(devices)
    gpus = own.pop("GPU", None)
    try:
        ray.init(
            address="local",
            num_cpus=cpus,
            num_gpus=gpus,
            resources={name: float(count) for name, count in own.items()} or None,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level="ERROR",
            _node_ip_address="127.0.0.1",
        )
    except (RuntimeError, OSError, ValueError, TimeoutError) as error:
        raise PreflightError(f"launcher ray: Ray does not start on this machine: {error}") from error


def _reach(address: str) -> str:
    """The address with which to join, once something answers there."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or _current()
    client = address.startswith("ray://")
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator or not port.isdigit():
        raise PreflightError(
            f"launcher ray: address {address!r} is no address of a cluster. Give HOST:PORT as `ray start --head` "
            "printed it, ray://HOST:PORT, auto, or null for a cluster on this machine"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()
    except (OSError, OverflowError) as error:
        started = f"ray start --head --node-ip-address={host} --port={port}"
        raise PreflightError(
            f"launcher ray: no Ray cluster at {address}: {error}. See `ray status --address {host}:{port}` on its head "
            f"node, which is started with `{started}`; name the head's address in launcher.address, never localhost"
        ) from error
    _use_token()
    if not client:
        _check_health(address)
    return address


def _current() -> str:
    file = Path(os.environ.get("RAY_TMPDIR") or "/tmp") / _CURRENT
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise PreflightError(
            "launcher ray: address: auto, but this machine belongs to no Ray cluster. Start one with `ray start "
            "--head`, join one with `ray start --address=HOST:PORT`, or name the cluster in launcher.address"
        ) from error


def _use_token() -> None:
    """Ray's own commands use the token that is there; its driver would only do so when told."""
    if "RAY_AUTH_MODE" in os.environ:
        return
    stored = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if "RAY_AUTH_TOKEN" in os.environ or stored.is_file():
        os.environ["RAY_AUTH_MODE"] = "token"


def _check_health(address: str) -> None:
    """Ask in a process of its own: a driver that is refused, or not answered, tries for minutes."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise PreflightError(
            f"launcher ray: something listens at {address}, but does not answer as the head of a Ray cluster within "
            f"{_ANSWER_S:.0f} s. Give the address that `ray start --head` printed (its --port, 6379 by default)"
        ) from error
    if done.returncode == 0:
        return
    said = [line for line in done.stderr.splitlines() if line.strip()]
    if "InvalidAuthToken" in done.stderr:
        raise PreflightError(
            f"launcher ray: the cluster at {address} does not take this process: its authentication token is missing "
            "or another one. Copy ~/.ray/auth_token from the head node, or set RAY_AUTH_TOKEN (`ray get-auth-token`)"
        )
    raise PreflightError(f"launcher ray: the cluster at {address} does not take this process:\n" + "\n".join(said[-3:]))


def _join(address: str) -> None:
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        raise PreflightError(f"launcher ray: cannot join the cluster at {address}: {error}") from error
