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

_READY_S = 120.0
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
        self.client_port = free_port()
        command = [*before, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--num-cpus={cpus}"]
        command += [f"--resources={resources}", f"--object-store-memory={_STORE}", "--disable-usage-stats"]
        command += ["--include-log-monitor=false", f"--dashboard-agent-listen-port={free_port(32_000)}"]
        if join is None:
            head = ["--head", "--port=0", f"--ray-client-server-port={self.client_port}", "--include-dashboard=false"]
            command += [*head, f"--temp-dir={self.folder}"]
        else:
            command += [f"--address={join}"]
        self.log = self.folder / "start.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "RAY_worker_niceness": "0", **(environment or {})},
                start_new_session=True,
            )
        self.address = join or ""
        deadline = time.monotonic() + _READY_S
        while "Ray runtime started" not in (said := self.log.read_text()):
            assert self.process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.1)
        if join is None:
            while (found := re.search(r"--address='([^']+)'", self.log.read_text())) is None:
                time.sleep(0.1)
            self.address = found[1]

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
