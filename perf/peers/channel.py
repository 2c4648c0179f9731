"""How a driver talks to a peer process: one JSON object a line. Standard library only: every environment has it.

peer   -> {"ready": facts}
driver -> {"step": k}
peer   -> {"seconds": s, ...}          any number of times
driver closes its end                  the peer leaves
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

LEAVE_S = 60.0
"""Seconds a peer may take to leave once it is told to."""


class PeerSide:
    """The peer's end. What libraries print to stdout goes to stderr, so that it never mixes with answers."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        sys.stdout = sys.stderr

    def send(self, message: Mapping[str, Any]) -> None:
        """One message to the driver."""
        self._answers.write(json.dumps(message) + "\n")
        self._answers.flush()

    def wait(self) -> int | None:
        """Block until the driver asks for a step; None when it asks for no more. The process is idle meanwhile."""
        line = sys.stdin.readline()
        return int(json.loads(line)["step"]) if line else None


class PeerError(RuntimeError):
    """A peer ended without an answer."""


class DriverSide:
    """The driver's end: a process that does one step each time it is told to."""

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path, cwd: Path
    ) -> None:  # fmt: skip
        self.name, self._log = name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8") as output:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=dict(environment),
                cwd=cwd,
                text=True,
            )

    def ready(self) -> dict[str, Any]:
        """Wait until it is set up; its facts."""
        facts: dict[str, Any] = self._read()["ready"]
        return facts

    def step(self, number: int) -> dict[str, Any]:
        """Let it do one step; its answer. Raises PeerError when it ended instead."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"step": number}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._failed()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._failed()
        message: dict[str, Any] = json.loads(line)
        return message

    def _failed(self) -> None:
        status = self._process.wait()
        tail = "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:])
        raise PeerError(f"peer {self.name} ended with status {status}; the end of {self._log}:\n{tail}")

    def __enter__(self) -> DriverSide:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:  # fmt: skip
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it may have left already
            self._process.stdin.close()
        if error is not None:
            self._process.kill()
        try:
            self._process.wait(LEAVE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
