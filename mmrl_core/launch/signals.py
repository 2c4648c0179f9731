"""Stopping in good order: SIGTERM and SIGINT ask for it, all ranks agree on it."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from mmrl_core.world import World

log = logging.getLogger("mmrl.launch")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Within the block, SIGTERM and SIGINT set a flag instead of ending the process; a second SIGINT interrupts.

    ::

        with StopRequest() as stop:
            while not stop.requested(world):
                ...  # one step
        # save

    Outside the main thread Python allows no handlers; then only `request` sets the flag.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._said = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before.clear()

    def request(self, number: int = signal.SIGTERM) -> None:
        """Ask for a stop, as the signal would."""
        self._signal = number

    def requested(self, world: World) -> bool:
        """Whether any rank was asked to stop. Collective: every rank calls it at the same point and gets the same."""
        agreed = world.maximum(self._signal or 0)
        if agreed and not self._said:
            self._said = True
            who = "" if self._signal else " (another rank)"
            log.warning("%s%s: the step is finished; saving and stopping", signal.Signals(agreed).name, who)
        return agreed > 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number
        # not through logging: the signal may have come in the middle of one of its writes
        name = signal.Signals(number).name
        os.write(2, f"mmrl: {name}: finishing this step, then saving; Ctrl-C again interrupts at once\n".encode())
