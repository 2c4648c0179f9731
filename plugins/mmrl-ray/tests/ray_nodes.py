"""Real Ray nodes as processes of this machine, as `ray start` makes them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

_READY_S = 180.0
_ATTEMPTS = 3
_STORE = str(80 * 2**20)


def free_port(above: int = 20_000) -> int:
    """Outside those that Ray gives its workers; test processes begin to look in different places."""
    for port in range(above + os.getpid() % 9_000, above + 12_000):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port")


class RayNode:
    """A node that runs until `stop`."""

    def __init__(
        self,
        *,
        cpus: int,
        join: str | None = None,
        resources: str = "{}",
        environment: Mapping[str, str] | None = None,
        before: Sequence[str] = (),
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="mr", dir="/tmp"))  # sockets have short names
        self.log = self.folder / "start.log"
        command = [*before, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--num-cpus={cpus}"]
        command += [f"--resources={resources}", f"--object-store-memory={_STORE}", "--disable-usage-stats"]
        command += ["--include-log-monitor=false"]
        if join is None:
            command += ["--head", "--port=0", "--include-dashboard=false", f"--temp-dir={self.folder}"]
        else:
            command += [f"--address={join}"]
        for _ in range(_ATTEMPTS):
            ports = [f"--dashboard-agent-listen-port={free_port(32_000)}"]
            self.client_port = free_port()
            ports += [f"--ray-client-server-port={self.client_port}"] if join is None else []
            self.process = self._start([*command, *ports], environment or {})
            if self._ready():
                break
        else:
            said = self.log.read_text()
            shutil.rmtree(self.folder)
            raise AssertionError(said)
        self.address = join or re.findall(r"--address='([^']+)'", self.log.read_text())[-1]

    def _start(self, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with self.log.open("wb") as log:
            return subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "RAY_worker_niceness": "0", **environment},
                start_new_session=True,
            )

    def _ready(self) -> bool:
        """False when it has given up: Ray allows a node 30 s to start, however busy the machine is."""
        deadline = time.monotonic() + _READY_S
        while "To terminate the Ray runtime" not in self.log.read_text():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)
        return True

    def __enter__(self) -> RayNode:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def processes(self) -> list[psutil.Process]:
        """Of this node, its workers included."""
        try:
            own = psutil.Process(self.process.pid)
            return [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """As when the machine loses its power."""
        for process in self.processes():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()

    def stop(self) -> None:
        """In good order, then by force."""
        family = self.processes()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=10)
        for process in alive:
            process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def isolated(token: Path) -> dict[str, str]:
    """Variables with a token of the tests' own in the file `token`, and nothing of a cluster that may run here."""
    token.write_text("0123456789abcdef" * 4)
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    own |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    return own | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def wait_for_nodes(address: str, count: int) -> None:
    """Until the cluster counts `count` living nodes; asked in a process of its own."""
    code = (
        "import sys, time, ray; ray.init(address=sys.argv[1], logging_level=40, log_to_driver=False)\n"
        "while sum(n['Alive'] for n in ray.nodes()) != int(sys.argv[2]): time.sleep(0.1)"
    )
    subprocess.run([sys.executable, "-c", code, address, str(count)], check=True, timeout=_READY_S)


def ranks_of(run_dir: Path) -> list[psutil.Process]:
    """The processes of a run's ranks."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "mmrl_core.launch.rank" in words and words[-1] == str(run_dir / "recipe.yaml"):
            found.append(process)
    return found


def ours() -> list[psutil.Process]:
    """Every process that these tests have started, as far as their token tells, without this one."""
    found = []
    for process in psutil.process_iter():
        try:
            token = process.environ().get("RAY_AUTH_TOKEN_PATH")
        except psutil.Error:
            continue
        if token == os.environ["RAY_AUTH_TOKEN_PATH"] and process.pid != os.getpid():
            found.append(process)
    return found
