"""The driver's end: a combination set up in its own process, doing one step each time it is told to."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from mmrl_core.errors import PerfError
from mmrl_core.launch.parent import PARENT_VARIABLE
from mmrl_core.perf.channel import PROTOCOL, SOCKET, Line
from mmrl_core.perf.trees import Tree

SETUP_S = 900.0
"""Seconds a combination may take until it is ready."""
STEP_S = 1800.0
"""Seconds a step may take."""
_LEAVE_S = 60.0
_LOG = "process.log"
_TAIL_LINES = 20


class CannotRunError(PerfError):
    """The combination cannot run here; the message is what it said itself."""


@dataclass(frozen=True, kw_only=True)
class StepNumbers:
    """What one step gave."""

    metrics: dict[str, float]
    """As the loop writes them."""
    memory: list[dict[str, int]]
    """Peak bytes by phase, one dict a rank; empty dicts when they were not asked for or cannot be known."""
    flops: float | None = None
    """Of one forward over all that was sampled; None when they were not asked for or cannot be known."""


class Session:
    """A process from its start to its end. The driver is its parent: it never outlives it."""

    def __init__(self, tree: Tree, recipe: Path, overrides: Sequence[str]) -> None:
        """Start it.

        Args:
            recipe: a recipe file in the folder that is its `run_dir`.
            overrides: `key=value`, applied by the process itself.
        """
        self._tree, self._folder = tree, recipe.parent
        self._step = 0
        self._line: Line | None = None
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._folder / SOCKET))
        self._listener.listen(1)
        command = [sys.executable, "-m", "mmrl_core.perf.process", str(recipe), *overrides]
        variables = {**tree.variables(), PARENT_VARIABLE: str(os.getpid())}
        with (self._folder / _LOG).open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=variables, cwd=self._folder
            )

    def ready(self) -> dict[str, Any]:
        """Wait until it is set up; its facts. Raises CannotRunError with its own words when it ends instead."""
        until = time.monotonic() + SETUP_S
        self._listener.settimeout(0.1)
        while self._line is None:
            ended = self._process.poll() is not None  # looked at first: what it connected before it ended is there
            try:
                connection, _ = self._listener.accept()
                self._line = Line(connection)
            except TimeoutError:
                if ended:
                    raise CannotRunError(self._said()) from None
                if time.monotonic() > until:
                    raise CannotRunError(f"was not ready after {SETUP_S:.0f} s") from None
        self._line.time_out(STEP_S)
        facts: dict[str, Any] = self._answer()["ready"]
        if facts["protocol"] != PROTOCOL:
            raise PerfError(f"{self._tree.name} measures by protocol {facts['protocol']}, this one by {PROTOCOL}")
        if Path(facts["core"]) != self._tree.core:
            raise PerfError(f"{self._tree.name}: the process imported {facts['core']} instead of {self._tree.core}")
        return facts

    def step(self, *, memory: bool = False, count: bool = False) -> StepNumbers:
        """Let it do the next step. One that takes peaks of memory, or counts operations, says nothing about time.

        Raises CannotRunError when it ends instead.
        """
        assert self._line is not None, "ready first"
        self._step += 1
        with suppress(BrokenPipeError):  # it has ended; the answer that does not come says so
            self._line.send({"step": self._step, "memory": memory, "count": count})
        answer = self._answer()
        assert answer["step"] == self._step, f"step {answer['step']} instead of {self._step}"
        return StepNumbers(metrics=answer["metrics"], memory=answer["memory"], flops=answer.get("flops"))

    def _answer(self) -> dict[str, Any]:
        assert self._line is not None
        try:
            message = self._line.receive()
        except TimeoutError:
            raise CannotRunError(f"step {self._step} was not done after {STEP_S:.0f} s") from None
        if message is None:
            self._process.wait()
            raise CannotRunError(self._said())
        return message

    def _said(self) -> str:
        """The error message of the ended process, or the end of what it wrote."""
        lines = (self._folder / _LOG).read_text(encoding="utf-8", errors="replace").splitlines()
        first = next((i for i, line in enumerate(lines) if _is_error(line)), None)
        if first is None:
            return f"ended with status {self._process.returncode}: " + "\n".join(lines[-_TAIL_LINES:])
        said = [lines[first].removeprefix("mmrl: ")]
        for line in lines[first + 1 :]:
            if line.startswith("mmrl: "):
                break
            said.append(line)
        return "\n".join(said[:_TAIL_LINES]).rstrip()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._line is not None:
            self._line.close()
        self._listener.close()
        (self._folder / SOCKET).unlink(missing_ok=True)
        if error is not None or self._line is None:
            self._process.terminate()
        try:
            self._process.wait(_LEAVE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _is_error(line: str) -> bool:
    """Whether the line is a message of the command line, and not of a log."""
    return line.startswith("mmrl: ") and not line.startswith(("mmrl: WARNING", "mmrl: ERROR", "mmrl: INFO"))
