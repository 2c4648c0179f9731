"""Phases add up, seconds count once, and the documented inequality holds."""

from __future__ import annotations

import itertools
import math
import random
import time

import pytest

from mmrl_core.metrics.names import METRICS
from mmrl_core.metrics.timers import PhaseTimers

SUMMED = [
    "timing/rollout",
    "timing/old_log_p",
    "timing/update",
    "timing/reference_model",
    "timing/resharding_to_train",
    "timing/resharding_to_infer",
    "timing/non_overlap_reference_model",
]
"""The right-hand side of the documented inequality."""


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def no_wait() -> None:
    """A device without queued work."""


def test_every_phase_is_there_every_step() -> None:
    expected = {metric.name for metric in METRICS if metric.name.startswith("timing/")}
    timers = PhaseTimers(no_wait)
    for _ in range(2):
        collected = timers.collect()
        assert collected.keys() == expected
        assert set(collected.values()) == {0.0}


def test_times_add_up_and_start_anew() -> None:
    clock = Clock()
    timers = PhaseTimers(no_wait, clock)
    for seconds in (1.0, 2.5):
        with timers("rollout"):
            clock.now += seconds
    assert timers.collect()["timing/rollout"] == 3.5
    assert timers.collect()["timing/rollout"] == 0.0


def test_nested_seconds_count_once() -> None:
    clock = Clock()
    timers = PhaseTimers(no_wait, clock)
    with timers("all"):
        with timers("rollout"):
            clock.now += 4
            with timers("resharding_to_infer"):
                clock.now += 2
                with timers("weights"):
                    clock.now += 1
        with timers("reference_model"):
            with timers("ref_onload"):
                clock.now += 8
            clock.now += 16
        clock.now += 32
    collected = {k: v for k, v in timers.collect().items() if v}
    assert collected == {
        "timing/all": 63,
        "timing/rollout": 4,
        "timing/resharding_to_infer": 2,
        "timing/weights": 1,
        "timing/reference_model": 24,
        "timing/ref_onload": 8,
    }


def test_the_inequality_holds_whatever_the_nesting() -> None:
    clock, dice = Clock(), random.Random(0)
    phases = [
        m.name.removeprefix("timing/") for m in METRICS if m.name.startswith("timing/") and m.name != "timing/all"
    ]
    timers = PhaseTimers(no_wait, clock)

    def nest(available: list[str]) -> None:
        clock.now += dice.random()
        for phase in dice.sample(available, min(3, len(available))):
            with timers(phase):
                nest([p for p in available if p != phase] if dice.random() < 0.5 else [])

    for _ in range(20):
        with timers("all"):
            nest(phases)
        collected = timers.collect()
        assert collected["timing/all"] >= math.fsum(collected[name] for name in SUMMED) - 1e-9
        assert min(collected.values()) >= -1e-9


def test_the_inequality_holds_on_a_real_clock() -> None:
    timers = PhaseTimers(no_wait)
    with timers("all"):
        for phase in ("rollout", "reference_model", "update"):
            with timers(phase):
                time.sleep(0.01)
    collected = timers.collect()
    assert collected["timing/all"] >= math.fsum(collected[name] for name in SUMMED)
    assert collected["timing/update"] >= 0.01


def test_queued_device_work_is_waited_for() -> None:
    """Work queued before a phase is not the phase's, work queued within is."""
    clock = Clock()
    queue = [5.0]

    def synchronize() -> None:
        clock.now += sum(queue)
        queue.clear()

    timers = PhaseTimers(synchronize, clock)
    with timers("update"):
        queue.append(3.0)
    assert timers.collect()["timing/update"] == 3.0


def test_an_exception_ends_its_phases() -> None:
    ticks = itertools.count()
    timers = PhaseTimers(no_wait, lambda: float(next(ticks)))
    with pytest.raises(ZeroDivisionError), timers("all"), timers("update"):
        _ = 1 / 0
    assert timers.collect()["timing/update"] == 1.0


def test_misuse_is_caught() -> None:
    timers = PhaseTimers(no_wait)
    with pytest.raises(AssertionError, match="no phase 'rolout'"), timers("rolout"):
        pass
    with pytest.raises(AssertionError, match="within itself"), timers("update"), timers("update"):
        pass
    with timers("update"), pytest.raises(AssertionError, match="still running"):
        timers.collect()
