"""Starts the ranks of a local run as processes and watches them until the last one has ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SignalException, start_processes
from torch.distributed.elastic.multiprocessing.api import SubprocessContext

from mmrl_core.launch.failure import MARK_VARIABLE

_POLL_S = 0.1
_FAILURE_GRACE_S = 3.0
"""How long the other ranks may take to fail by themselves, with an error worth reading, once one has failed."""
_SAVE_GRACE_S = 600.0
"""How long ranks may take to finish their step and save after they were told to stop."""
_KILL_WAIT_S = 15.0
_TAIL_LINES = 30
_FORWARDED = (signal.SIGTERM, signal.SIGINT)


def run_ranks(
    executable: str,
    arguments: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    logs: Mapping[int, Path],
) -> int:
    """Run `executable *arguments` once per environment, rank by rank, and wait for all of them.

    SIGTERM and SIGINT are forwarded, and the ranks get ten minutes to save; a second SIGINT kills. When a rank fails
    the others are killed seconds later, and stderr says which rank failed how, with the end of its log.

    Returns 0, or the exit status of the rank that failed first (128 + signal when it was killed).
    """
    started = time.time()
    offsets = {rank: path.stat().st_size if path.exists() else 0 for rank, path in logs.items()}
    with _handlers_restored() as before:
        received: list[int] = []
        try:
            context = start_processes(
                name="mmrl",
                entrypoint=executable,
                args={rank: tuple(arguments) for rank in range(len(environments))},
                envs={rank: dict(environment) for rank, environment in enumerate(environments)},
                logs_specs=_Inherited(),
            )
        except SignalException as error:  # torch's handler, in the moment before ours; ranks die with this process
            return 128 + int(error.sigval)
        # torch.elastic's own waiting would give survivors of a failure 30 s and would not let ranks save on a signal
        for number in before:
            signal.signal(number, (lambda n, _: received.append(n)) if number in _FORWARDED else before[number])
        assert isinstance(context, SubprocessContext)
        ranks = {rank: handler.proc for rank, handler in context.subprocess_handlers.items()}
        marks = {rank: Path(e[MARK_VARIABLE]) for rank, e in enumerate(environments) if MARK_VARIABLE in e}
        watch = _Watch(ranks, received, marks)
        try:
            watch.until_all_ended()
        finally:
            watch.kill_rest()
    if watch.failures:
        print(_explain(watch, logs, offsets, time.time() - started), file=sys.stderr, flush=True)
    return watch.status


class _Inherited(LogsSpecs):
    """Ranks inherit our stdout and stderr; `mmrl_core.launch.rank` redirects its own."""

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        inherit = dict.fromkeys(envs, "")
        return LogsDest(stdouts=inherit, stderrs=dict(inherit), error_files=dict(inherit))

    @property
    def root_log_dir(self) -> str:
        return os.devnull


class _Watch:
    """The ranks' processes and what has become of them."""

    def __init__(
        self, ranks: Mapping[int, subprocess.Popen[Any]], received: list[int], marks: Mapping[int, Path]
    ) -> None:
        self.ranks = ranks
        self.failures: dict[int, float] = {}
        """Ranks that failed, not by our hand, and the moment."""
        self.killed_by_us: set[int] = set()
        self.gave_up: str | None = None
        self._received = received
        self._marks = marks
        self._handled = 0
        self._interrupts = 0
        self._stop_deadline: float | None = None
        self._kill_at: float | None = None

    @property
    def failed(self) -> list[int]:
        """The ranks that failed, the cause first."""
        return sorted(self.failures, key=lambda rank: (self.failures[rank], rank))

    @property
    def status(self) -> int:
        """The launcher's exit status."""
        if self.failures:
            return _shell_status(self.ranks[self.failed[0]].returncode)
        if self._interrupts > 1:
            return 128 + int(signal.SIGINT)
        return 0 if self.gave_up is None else 128 + int(signal.SIGKILL)

    def until_all_ended(self) -> None:
        while True:
            self._forward_signals()
            running = [rank for rank, process in self.ranks.items() if process.poll() is None]
            self._note_failures()
            if not running:
                return
            now = time.monotonic()
            if self._kill_at is not None and now >= self._kill_at:
                return
            if self._stop_deadline is not None and now >= self._stop_deadline:
                self.gave_up = f"the ranks did not end within {_SAVE_GRACE_S:.0f} s of being told to stop"
                print(f"mmrl: {self.gave_up}; killing them", file=sys.stderr, flush=True)
                return
            time.sleep(_POLL_S)

    def kill_rest(self) -> None:
        """Kill every rank that still runs, with the process group it leads, and wait for it."""
        running = {rank: process for rank, process in self.ranks.items() if process.poll() is None}
        for rank, process in running.items():
            self.killed_by_us.add(rank)
            _signal_group(process, signal.SIGKILL)
        for rank, process in running.items():
            try:
                process.wait(_KILL_WAIT_S)
            except subprocess.TimeoutExpired:  # uninterruptible in the kernel: a wedged driver
                print(f"mmrl: rank {rank} (pid {process.pid}) does not die of SIGKILL", file=sys.stderr, flush=True)

    def _forward_signals(self) -> None:
        while self._handled < len(self._received):
            number = self._received[self._handled]
            self._handled += 1
            self._interrupts += number == signal.SIGINT
            if self._interrupts > 1:
                print("mmrl: interrupted again; killing the ranks", file=sys.stderr, flush=True)
                self._kill_at = time.monotonic()
                return
            if self._stop_deadline is None:
                self._stop_deadline = time.monotonic() + _SAVE_GRACE_S
                name = signal.Signals(number).name
                print(f"mmrl: {name}: telling {len(self.ranks)} ranks to save and stop", file=sys.stderr, flush=True)
            for process in self.ranks.values():
                if process.poll() is None:
                    process.send_signal(number)  # the rank alone: its reward workers must live until it has saved

    def _note_failures(self) -> None:
        for rank, process in self.ranks.items():
            if process.returncode not in (None, 0) and rank not in self.failures:
                self.failures[rank] = self._moment(rank)
                if self._kill_at is None:
                    self._kill_at = time.monotonic() + _FAILURE_GRACE_S

    def _moment(self, rank: int) -> float:
        """When the rank failed: by its own mark, or, killed on the spot, since the last look."""
        mark = self._marks.get(rank)
        text = mark.read_text() if mark is not None and mark.exists() else ""
        return float(text) if text else time.time() - _POLL_S


def _signal_group(process: subprocess.Popen[Any], number: signal.Signals) -> None:
    """A rank leads its own session, so this reaches what it has started, and nothing else."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:  # ended meanwhile
        return


def _shell_status(returncode: int) -> int:
    return returncode if returncode >= 0 else 128 - returncode


def _explain(watch: _Watch, logs: Mapping[int, Path], offsets: Mapping[int, int], seconds: float) -> str:
    """The message for a failed run."""
    rank, *others = watch.failed
    process = watch.ranks[rank]
    end = _how(process.returncode)
    lines = [f"mmrl: rank {rank} of {len(watch.ranks)} (pid {process.pid}) {end} after {seconds:.0f} s"]
    if process.returncode == -signal.SIGKILL:
        lines.append("  When you did not kill it, the kernel may have for want of memory: see `dmesg`")
    lines += [f"  rank {other} then {_how(watch.ranks[other].returncode)}" for other in others]
    if watch.killed_by_us:
        lines.append(f"  the other ranks were killed: {', '.join(map(str, sorted(watch.killed_by_us)))}")
    if rank not in logs:
        lines.append(f"  rank {rank} wrote to this terminal: see above")
        return "\n".join(lines)
    tail = _tail(logs[rank], offsets[rank])
    lines.append(f"  the end of {logs[rank]}:" if tail else f"  {logs[rank]} is empty")
    return "\n".join([*lines, *(f"  | {line}" for line in tail)])


def _how(returncode: int) -> str:
    if returncode >= 0:
        return f"exited with status {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = "a real-time signal"
    return f"was killed by signal {-returncode} ({name})"


def _tail(path: Path, offset: int) -> list[str]:
    """The last lines this start has written; older starts append to the same file."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(offset, size - 16_384))
        return file.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]


@contextmanager
def _handlers_restored() -> Iterator[dict[signal.Signals, Any]]:
    """start_processes and we install signal handlers (in the main thread only); the caller gets its own back."""
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            handler = signal.getsignal(number)
            before[number] = handler if handler is not None else signal.SIG_DFL
    try:
        yield before
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
