"""SIGTERM and SIGINT while ranks run elsewhere."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_HANDLED = (signal.SIGTERM, signal.SIGINT)


class Interrupts:
    """Within the block these signals are collected instead of ending the process (in the main thread only)."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in _HANDLED:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before.clear()

    def any(self) -> bool:
        """Whether there was one."""
        return bool(self.received)

    @property
    def status(self) -> int:
        """The exit status after the first of them, as shells have it."""
        return 128 + self.received[0]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
