"""The actor beside each rank: starts its process on the node, watches it, and hands on what it says.

The rank itself is the program that every launcher runs, in a process of its own: signals reach its main thread, a
native crash ends it and not the actor, and it never imports ray. It dies with the actor, whatever the actor dies of.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import ray

from mmrl_core.devices.cores import usable_cores
from mmrl_core.launch.failure import MARK_VARIABLE
from mmrl_core.launch.parent import PARENT_VARIABLE

STDOUT, STDERR = 1, 2
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
_CHUNK = 65_536
_LAST_WORDS_S = 2.0
"""How long a process that has ended may still be quoted: something it started may hold its output open."""
_KILL_WAIT_S = 15.0
_RAYS_OWN = ("PYTHONBREAKPOINT", "RAY_JOB_ID", "RAY_CLIENT_MODE", "RAY_RAYLET_PID", "RAY_LD_PRELOAD_ON_WORKERS")
"""Variables that Ray sets for its workers, which a rank is not."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """What the launcher must know of a rank's node before the ranks start."""

    address: str
    devices: Sequence[str]
    """Ids of the devices that Ray gave to this rank; empty for CPUs."""
    cores: int
    niceness: int
    """By how much Ray has lowered the priority of its workers, and with them of the ranks."""
    interface: str | None
    """The network interface that has `address`; None: unknown, or the node's environment has chosen one."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What to run."""

    command: Sequence[str]
    """Without the interpreter."""
    environment: Mapping[str, str]
    """Over that of the node."""
    working_dir: str
    log: str | None
    """The file that takes what the process writes; None: the launcher shows it."""
    mark: str
    """The file in which the process leaves the moment of its failure."""
    terminal: tuple[int, int] | None
    """(lines, columns) of the launcher's terminal, if it has one."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What has happened since the last one."""

    output: Sequence[tuple[int, bytes]]
    """(stream, bytes), in the order of their coming."""
    last: int
    """Number of the last piece of output so far; the next `poll` acknowledges it."""
    returncode: int | None
    """As of subprocess; None: it runs."""
    failed_s: float | None
    """How long ago the process failed: by its own mark, else when it ended."""
    out_of_memory: bool
    """The kernel has killed something on this node for want of memory since the process started."""


@dataclass
class _Output:
    """Pieces of output, numbered, kept until they are acknowledged."""

    pieces: list[tuple[int, int, bytes]] = field(default_factory=list)
    last: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)

    def add(self, stream: int, piece: bytes) -> None:
        with self.changed:
            self.last += 1
            self.pieces.append((self.last, stream, piece))
            self.changed.notify_all()

    def after(self, number: int) -> list[tuple[int, bytes]]:
        with self.changed:
            self.pieces = [piece for piece in self.pieces if piece[0] > number]
            return [(stream, piece) for _, stream, piece in self.pieces]


class RankProcess:
    """One rank on this node. A Ray actor: its methods are called one after the other, by the launcher alone."""

    def __init__(self) -> None:
        self._output = _Output()
        self._process: subprocess.Popen[bytes] | None = None
        self._readers: list[threading.Thread] = []
        self._ended: float | None = None
        self._port: socket.socket | None = None
        self._mark: Path | None = None
        self._kills = _out_of_memory_kills()

    def host(self, resource: str) -> Host:
        """About this node."""
        address = ray.util.get_node_ip_address()
        ids = ray.get_runtime_context().get_accelerator_ids()
        return Host(
            address=address,
            devices=tuple(str(i) for i in ids.get(resource, [])),
            cores=usable_cores(),
            niceness=os.nice(0) - psutil.Process(os.getppid()).nice(),
            interface=None if GLOO_INTERFACE in os.environ else _interface(address),
        )

    def reserve_port(self, address: str) -> int:
        """A free port for the ranks to meet at. Held, not listened on, so that nobody else is given it meanwhile."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._port = socket.socket(family, socket.SOCK_STREAM)
        self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._port.bind((address, 0))
        port: int = self._port.getsockname()[1]
        return port

    def start(self, order: Order) -> int:
        """Start the rank; returns its pid."""
        assert self._process is None
        self._mark = Path(order.mark)
        self._mark.unlink(missing_ok=True)
        environment = {name: value for name, value in os.environ.items() if name not in _RAYS_OWN}
        environment |= order.environment
        environment |= {PARENT_VARIABLE: str(os.getpid()), MARK_VARIABLE: str(self._mark)}
        if order.log is None:
            reads, writes = zip(*(_stream(order.terminal) for _ in (STDOUT, STDERR)), strict=True)
        else:
            reads, writes = (), (os.open(order.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644),)
        # Ray blocks SIGINT in its processes, and what they start would inherit that: a rank saves on it
        blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self._process = subprocess.Popen(
                [sys.executable, *order.command],
                stdin=subprocess.DEVNULL,
                stdout=writes[0],
                stderr=writes[-1],
                env=environment,
                cwd=order.working_dir,
                start_new_session=True,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            for descriptor in writes:
                os.close(descriptor)
        for stream, descriptor in zip((STDOUT, STDERR), reads, strict=False):
            reader = threading.Thread(target=self._read, args=(stream, descriptor), daemon=True)
            reader.start()
            self._readers.append(reader)
        threading.Thread(target=self._wait, daemon=True).start()
        return self._process.pid

    def poll(self, after: int, seconds: float) -> Report:
        """What has happened since the piece of output numbered `after`; waits up to `seconds` for something."""
        changed = self._output.changed
        with changed:
            changed.wait_for(lambda: self._output.last > after or self._ended is not None, timeout=seconds)
        ended = self._ended
        if ended is not None:
            deadline = time.monotonic() + _LAST_WORDS_S
            for reader in self._readers:
                reader.join(max(0.0, deadline - time.monotonic()))
        assert self._process is not None
        code = self._process.returncode if ended is not None else None
        output = self._output.after(after)
        return Report(
            output=output,
            last=after + len(output),
            returncode=code,
            failed_s=None if not code or ended is None else time.time() - self._failure_moment(ended),
            out_of_memory=_out_of_memory_kills() > self._kills,
        )

    def signal(self, number: int) -> None:
        """To the rank alone: what it has started must live until it has saved."""
        if self._process is not None and self._ended is None:
            self._process.send_signal(number)

    def stop(self) -> None:
        """Kill the rank with everything in its session, and wait for it."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            with self._output.changed:
                self._output.changed.wait_for(lambda: self._ended is not None, timeout=_KILL_WAIT_S)
        if self._mark is not None:
            self._mark.unlink(missing_ok=True)
        if self._port is not None:
            self._port.close()

    def _failure_moment(self, ended: float) -> float:
        assert self._mark is not None
        text = self._mark.read_text() if self._mark.exists() else ""
        return float(text) if text else ended

    def _read(self, stream: int, descriptor: int) -> None:
        while True:
            try:
                piece = os.read(descriptor, _CHUNK)
            except OSError:  # how a pseudo-terminal says that its other side is closed
                piece = b""
            if not piece:
                os.close(descriptor)
                return
            self._output.add(stream, piece)

    def _wait(self) -> None:
        assert self._process is not None
        self._process.wait()
        with self._output.changed:
            self._ended = time.time()
            self._output.changed.notify_all()


def _stream(terminal: tuple[int, int] | None) -> tuple[int, int]:
    """(the end to read, the end to write to)."""
    if terminal is None:
        return os.pipe()
    ours, theirs = pty.openpty()
    attributes = termios.tcgetattr(theirs)
    attributes[1] &= ~termios.OPOST  # the launcher's own terminal turns line feeds into new lines
    termios.tcsetattr(theirs, termios.TCSANOW, attributes)
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *terminal, 0, 0))
    return ours, theirs


def _interface(address: str) -> str | None:
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            return str(name)
    return None


def _out_of_memory_kills() -> int:
    """How many processes Linux has killed for want of memory, on this machine and in this control group."""
    total = 0
    for path in (Path("/proc/vmstat"), Path("/sys/fs/cgroup/memory.events")):
        try:
            text = path.read_text(encoding="utf-8")
        except OSError:  # not Linux, or no such control group
            continue
        total += sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill "))
    return total
