"""Wall-clock time of a step by phase. This module imports no torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from mmrl_core.metrics.names import PARTS, TIMING

_PHASES = tuple(metric.name.removeprefix("timing/") for metric in TIMING)


@dataclass(kw_only=True)
class _Open:
    phase: str
    begin: float
    inner: float = 0.0
    """Seconds of phases within that are counted by themselves."""


class PhaseTimers:
    """Accumulates wall seconds by phase until `collect`.

    ::

        with timers("all"):
            with timers("rollout"):
                ...
        metrics.update(timers.collect())

    Phases nest, and a second counts once: bringing weights to the engine within the rollout counts as
    `resharding_to_infer` and not as `rollout`. Only `all` contains its phases, and `ref_onload` and `ref_offload` are
    counted in `reference_model` too. So timing/all is at least the sum of the phases within it, whatever the nesting.
    """

    def __init__(
        self,
        synchronize: Callable[[], None],
        clock: Callable[[], float] = time.perf_counter,
        mark: Callable[[str], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """`mark("timing/PHASE")` is entered for the length of each phase, to show it in a profile."""
        self._synchronize = synchronize
        self._clock = clock
        self._mark = mark
        self._open: list[_Open] = []
        self._seconds = dict.fromkeys(_PHASES, 0.0)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time a block as `phase` (a name of the `timing/` table), the device synchronised at both ends.

        A phase may run several times a step; its times add up.
        """
        assert phase in self._seconds, f"no phase {phase!r}; define timing/{phase} in mmrl_core/metrics/names.py"
        assert all(outer.phase != phase for outer in self._open), f"phase {phase!r} within itself would count twice"
        self._synchronize()
        entry = _Open(phase=phase, begin=self._clock())
        self._open.append(entry)
        try:
            with self._mark(f"timing/{phase}"):
                yield
                self._synchronize()
        finally:
            elapsed = self._clock() - entry.begin
            self._open.pop()
            if phase in PARTS:
                self._seconds[phase] += elapsed
            else:
                self._seconds[phase] += elapsed - entry.inner
                entry.inner = elapsed
            if self._open:
                self._open[-1].inner += entry.inner

    def collect(self) -> dict[str, float]:
        """Seconds of every phase since the last `collect`, 0.0 for those that did not run, and start anew."""
        assert not self._open, f"phase {self._open[-1].phase!r} is still running"
        collected = {f"timing/{phase}": seconds for phase, seconds in self._seconds.items()}
        self._seconds = dict.fromkeys(_PHASES, 0.0)
        return collected
