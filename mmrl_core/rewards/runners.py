"""Where a reward runs: inline in this process, or in a worker that can be killed. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from mmrl_core.contracts import Reward, RewardResult, Sample
from mmrl_core.errors import MmrlError, RewardError
from mmrl_core.plugins import Selected
from mmrl_core.rewards.checks import BatchFailedError, check_results
from mmrl_core.rewards.creation import create_reward
from mmrl_core.rewards.frames import receive_frame, send_frame
from mmrl_core.rewards.guard import STATUS

_LAUNCHER_VARIABLES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_LAUNCHER_PREFIXES = ("GROUP_", "ROLE_", "TORCHELASTIC_")
_END_S = 10.0
"""How long a worker's guard may take to end its tree before the trainer kills the process group itself."""


_PEACE_S = 2.0
"""How long an idle worker may take to end by itself."""


class Runner(ABC):
    """One reward of the recipe, running somewhere."""

    restarts = 0
    """Workers started to replace one that was killed or died."""

    def __init__(self, label: str, selected: Selected, device: str) -> None:
        self.label = label
        self.selected = selected
        self.device = device

    @property
    def what(self) -> str:
        """Reward, distribution and version, for messages."""
        return f"reward {self.label!r} of {self.selected.found.distribution} {self.selected.found.version}"

    @abstractmethod
    def start(self) -> None:
        """Start what must exist before any communication is set up."""

    @abstractmethod
    def setup(self) -> int:
        """Set the reward up and return its own batch size. Raises RewardError."""

    @abstractmethod
    def score(self, samples: Sequence[Sample], *, last: bool) -> list[RewardResult]:
        """Score one batch; `last` of this round. Raises BatchFailedError, or RewardError when it cannot go on."""

    @abstractmethod
    def close(self) -> None:
        """End everything this runner started. A second call does nothing."""

    def _setup_error(self, reason: str, details: str) -> RewardError:
        return RewardError(f"{self.what} failed to set up: {reason}\n{details}".rstrip())


class InlineRunner(Runner):
    """Runs in this process and thread. No deadline is possible."""

    _reward: Reward
    _loaded = False

    def start(self) -> None:
        """Nothing to start."""

    def close(self) -> None:
        """Nothing to end."""

    def setup(self) -> int:
        """See Runner."""
        try:
            self._reward = create_reward(self.selected)
            self._reward.setup(self.device)
        except Exception as error:
            raise self._setup_error(_reason(error), traceback.format_exc()) from error
        return self._reward.batch_size

    def score(self, samples: Sequence[Sample], *, last: bool) -> list[RewardResult]:
        """See Runner."""
        try:
            if not self._loaded:
                self._reward.onload()
                self._loaded = True
            results = check_results(self._reward.score(samples), len(samples))
            if last:
                self._reward.offload()
                self._loaded = False
        except BatchFailedError:
            raise
        except Exception as error:
            raise BatchFailedError(_reason(error), details=traceback.format_exc()) from error
        return results


class WorkerRunner(Runner):
    """Runs in a worker process (see worker.py) that is killed, with all it started, at the deadline."""

    def __init__(
        self, label: str, selected: Selected, device: str, *, deadline_s: float, setup_limit_s: float
    ) -> None:  # fmt: skip
        super().__init__(label, selected, device)
        self._deadline_s = deadline_s
        self._setup_limit_s = setup_limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._interrupted = False
        self._batch_size = 0

    @property
    def pid(self) -> int | None:
        """The guard's process id while the worker runs."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the worker, which sets the reward up at once; `setup` waits for it."""
        assert self._process is None
        self._channel, channel = socket.socketpair()
        self._lifeline, lifeline = socket.socketpair()
        with channel, lifeline:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "mmrl_core.rewards.worker"),
                    *(str(channel.fileno()), str(lifeline.fileno()), str(os.getpid())),
                ],
                pass_fds=(channel.fileno(), lifeline.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a reward prints must not mix with the trainer's output
                start_new_session=True,
                env=worker_environment(os.environ),
            )
        component = self.selected.found.component
        options = self.selected.options
        setup = {
            "name": component.name,
            "target": component.target,
            "options_model": component.options,
            "options": None if options is None else options.model_dump(mode="json"),
            "distribution": self.selected.found.distribution,
            "version": self.selected.found.version,
            "device": self.device,
            "sys_path": sys.path,
        }
        self._setup_until = time.monotonic() + self._setup_limit_s
        self._ready = False
        with contextlib.suppress(EOFError, TimeoutError):  # a worker that died already is reported by `setup`
            send_frame(self._channel, json.dumps(setup).encode(), self._setup_until)

    def setup(self) -> int:
        """See Runner. Waits at most the set-up limit, counted from the start of the worker."""
        assert self._process is not None
        if self._ready:
            return self._batch_size
        try:
            answer = json.loads(receive_frame(self._channel, self._setup_until))
        except TimeoutError:
            self._end()
            raise self._setup_error(f"not done after {self._setup_limit_s:g} s; the worker was killed", "") from None
        except EOFError:
            raise self._setup_error(self._bury(), "its own output is on stderr") from None
        if "error" in answer:
            self._end()
            raise self._setup_error(answer["error"], answer["traceback"])
        self._ready = True
        self._batch_size = int(answer["batch_size"])
        return self._batch_size

    def score(self, samples: Sequence[Sample], *, last: bool) -> list[RewardResult]:
        """See Runner. The deadline covers sending, scoring and the answer, not a restarted worker's set-up."""
        try:
            batch = pickle.dumps({"samples": list(samples), "offload": last}, protocol=pickle.HIGHEST_PROTOCOL)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise RewardError(
                f"{self.what}: samples cannot be sent to its worker: {error}. Cure: plain data in prompt columns, or "
                "`run: inline`"
            ) from error
        if self._process is None or self._ended_while_idle():
            self._restart()
        self.setup()
        until = time.monotonic() + self._deadline_s
        try:
            send_frame(self._channel, batch, until)
            answer = json.loads(receive_frame(self._channel, until))
        except TimeoutError:
            self._restart()
            raise BatchFailedError(f"timed out after {self._deadline_s:g} s", timed_out=True) from None
        except EOFError:
            reason = self._bury()
            self._restart()
            raise BatchFailedError(reason) from None
        if "error" in answer:
            raise BatchFailedError(answer["error"], details=answer["traceback"])
        return [
            RewardResult(value=value, failure=failure, scores=scores) for value, failure, scores in answer["results"]
        ]

    def close(self) -> None:
        """End the worker, which may finish in peace when it is idle, and everything it started."""
        if self._process is not None and self._ready:
            self._channel.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_PEACE_S)
        self._end()

    def interrupt(self) -> None:
        """From another thread: end the worker for good, so that a `score` that waits for it returns."""
        self._interrupted = True
        if self._process is not None:
            with contextlib.suppress(OSError):  # closed meanwhile by that `score`
                self._lifeline.shutdown(socket.SHUT_RDWR)

    def _restart(self) -> None:
        """Start a new worker now, so that it sets up while the trainer goes on."""
        self._end()
        if self._interrupted:
            raise RewardError(f"{self.what}: interrupted")
        self.start()
        self.restarts += 1

    def _ended_while_idle(self) -> bool:
        """Between batches a worker says nothing: a readable channel is a closed one."""
        self._channel.settimeout(0.0)
        try:
            return self._ready and self._channel.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True

    def _bury(self) -> str:
        """How the scoring process ended, once its channel is closed; ends the rest of the worker."""
        self._lifeline.settimeout(_END_S)
        try:
            status = self._lifeline.recv(STATUS.size, socket.MSG_WAITALL)
        except (TimeoutError, ConnectionResetError):
            status = b""
        self._end()
        if len(status) != STATUS.size:
            return "the worker vanished without a status"
        return describe_status(STATUS.unpack(status)[0])

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        self._lifeline.close()  # the guard takes this as the order to end its tree
        self._channel.close()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def worker_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The trainer's environment without what would make a library join the trainer's process group. One compute
    thread, unless the variable is set: rewards share the machine with the trainer."""
    kept = {
        name: value
        for name, value in environment.items()
        if name not in _LAUNCHER_VARIABLES and not name.startswith(_LAUNCHER_PREFIXES)
    }
    kept.setdefault("OMP_NUM_THREADS", "1")
    return kept


def describe_status(status: int) -> str:
    """A wait status in words."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        hint = ", by the kernel when memory runs out, or by an operator" if number == signal.SIGKILL else ""
        return f"its worker was killed by {name} ({signal.strsignal(number)}{hint})"
    return f"its worker exited with status {os.WEXITSTATUS(status)}"


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, MmrlError) else f"{type(error).__name__}: {error}"
