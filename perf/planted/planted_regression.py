"""Makes phases of the loop slower, or larger, in one checkout: what the gate must find.

A plugin that is installed by putting its folder on PYTHONPATH. It looks at three variables:

    PLANTED_IN       the checkout it acts on; in other ones it does nothing
    PLANTED_TIME     `update=1.15`: the phase takes 1.15 times as long
    PLANTED_MEMORY   `rollout=1.03`: within the phase 1.03 times the memory of the process is in use
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mmrl_core
from mmrl_core.metrics.timers import PhaseTimers

mmrl_api = 1


def plant(original: Callable[..., Any], slower: dict[str, float], larger: dict[str, float]) -> Callable[..., Any]:
    """`PhaseTimers.__call__` with its phases slower and larger."""

    @contextmanager
    def planted(self: PhaseTimers, phase: str) -> Iterator[None]:
        with original(self, phase):
            held = b"\1" * int((larger[phase] - 1) * anonymous()) if phase in larger else b""
            begin = time.perf_counter()
            yield
            until = begin + slower.get(phase, 1.0) * (time.perf_counter() - begin)
            while time.perf_counter() < until:
                pass
            del held

    return planted


def anonymous() -> int:
    """Bytes of this process that are no mapped files."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


def factors(variable: str) -> dict[str, float]:
    """Of `phase=factor phase=factor`."""
    words = (word.partition("=") for word in os.environ.get(variable, "").split())
    return {phase: float(factor) for phase, _, factor in words}


if Path(mmrl_core.__file__).resolve().parent.parent == Path(os.environ.get("PLANTED_IN", "/nowhere")).resolve():
    planted = plant(PhaseTimers.__call__, factors("PLANTED_TIME"), factors("PLANTED_MEMORY"))
    PhaseTimers.__call__ = planted  # type: ignore[method-assign]
