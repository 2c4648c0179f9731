"""The gate's rules on simulated noise: what must be found is found, equal code is let through."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mmrl_core.errors import PerfError
from mmrl_core.perf import side_by_side
from mmrl_core.perf.decide import (
    CERTAIN_TIME,
    TIME_LIMIT,
    agreed,
    baseline_limit,
    memory_state,
    paired_ratio,
    time_state,
)
from mmrl_core.perf.jobs import PHASES
from mmrl_core.perf.matrix import Combination, Matrix
from mmrl_core.perf.session import CannotRunError, StepNumbers
from mmrl_core.perf.side_by_side import Finding, Turns, compare_trees
from mmrl_core.perf.trees import Tree

SHARES = {"rollout": 0.33, "old_log_p": 0.16, "reference_model": 0.15, "update": 0.35, "resharding_to_infer": 0.005}
STEP_S = 0.12
PEAK = 330_000_000


@dataclass
class Machine:
    """A noisy machine: steps scatter by `scatter`, some take far longer, and each process is off by `luck` for life."""

    rng: random.Random
    scatter: float = 0.12
    luck: float = 0.02
    slower: dict[str, float] = field(default_factory=dict)
    """Of the head, by phase."""
    larger: dict[str, float] = field(default_factory=dict)
    processes: int = 0

    def session(self, tree: Tree, recipe: Path, overrides: Any) -> Process:
        self.processes += 1
        return Process(self, tree.name == "head")


class Process:
    """Stands for a Session: no process, simulated numbers."""

    def __init__(self, machine: Machine, is_head: bool) -> None:
        self._machine, self._is_head = machine, is_head
        self._luck = {p: math.exp(machine.rng.gauss(0, machine.luck / math.sqrt(2))) for p in SHARES}

    def ready(self) -> dict[str, Any]:
        return {"fingerprint": {"id": "here"}}

    def step(self, *, memory: bool = False) -> StepNumbers:
        rng, timing = self._machine.rng, {}
        for phase, share in SHARES.items():
            factor = self._machine.slower.get(phase, 1.0) if self._is_head else 1.0
            noise = math.exp(rng.gauss(0, self._machine.scatter / math.sqrt(2)))
            noise *= 1 + rng.random() if rng.random() < 0.05 else 1
            timing[f"timing/{phase}"] = STEP_S * share * factor * self._luck[phase] * noise
        timing["timing/all"] = sum(timing.values()) + 1e-3
        lengths = {"response_length/min": 16.0, "response_length/max": 16.0}
        peaks = {}
        for phase in PHASES:
            factor = self._machine.larger.get(phase, 1.0) if self._is_head else 1.0
            peaks[phase] = int(PEAK * factor * (1 + rng.gauss(0, 0.002)))
        return StepNumbers(metrics={**timing, **lengths}, memory=[peaks] if memory else [{}])

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        return None


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Machine], list[Finding]]:
    """The whole side-by-side comparison on a simulated machine."""
    combination = Combination(device="cpu", backend="b", rollout="r", modality="text", components=())
    matrix = Matrix(size="tiny", tokens=16, overrides=(), combinations=(combination,), unavailable=())
    trees = [Tree(name=name, folder=tmp_path) for name in ("base", "head")]

    def run(machine: Machine) -> list[Finding]:
        monkeypatch.setattr(side_by_side, "Session", machine.session)
        monkeypatch.setattr(Matrix, "recipe", lambda self, c, folder, models: (folder / "perf.json", {}))
        return compare_trees(matrix, combination, *trees, Turns.of("tiny", None), tmp_path, lambda line: None)

    return run


def fired(findings: list[Finding]) -> set[tuple[str, str]]:
    return {(f.kind, f.phase) for f in findings if f.state == "fired"}


def test_equal_code_is_let_through(judge: Callable[[Machine], list[Finding]]) -> None:
    rng = random.Random(1)
    verdicts = [judge(Machine(rng)) for _ in range(100)]  # 1,200 phases
    assert [fired(v) for v in verdicts if fired(v)] == []
    states = [f.state for v in verdicts for f in v]
    assert states.count("fine") > 0.99 * len(states), "an unclear phase is one that the gate does not watch"


@pytest.mark.parametrize("phase", SHARES)
def test_a_slower_phase_is_found_and_named(judge: Callable[[Machine], list[Finding]], phase: str) -> None:
    rng = random.Random(PHASES.index(phase))
    verdicts = [fired(judge(Machine(rng, slower={phase: CERTAIN_TIME}))) for _ in range(20)]
    assert sum(("time", phase) in verdict for verdict in verdicts) >= 19
    others = {found for verdict in verdicts for found in verdict} - {("time", phase), ("time", "all")}
    assert others == set()


@pytest.mark.parametrize("phase", PHASES)
def test_a_larger_phase_is_found_and_named(judge: Callable[[Machine], list[Finding]], phase: str) -> None:
    rng = random.Random(0)
    for _ in range(5):
        assert fired(judge(Machine(rng, larger={phase: 1.03}))) == {("memory", phase)}


def test_a_faster_phase_does_not_fire(judge: Callable[[Machine], list[Finding]]) -> None:
    found = judge(Machine(random.Random(0), slower={"update": 0.5}, larger={"update": 0.5}))
    assert fired(found) == set()
    assert next(f for f in found if (f.kind, f.phase) == ("time", "update")).estimate.ratio == pytest.approx(
        0.5, rel=0.1
    )


def test_a_machine_too_noisy_to_tell_says_so(judge: Callable[[Machine], list[Finding]]) -> None:
    states = [f.state for f in judge(Machine(random.Random(2), scatter=1.5)) if f.kind == "time"]
    assert "unclear" in states
    assert "fired" not in states


def test_one_unlucky_pair_of_processes_is_asked_again(judge: Callable[[Machine], list[Finding]]) -> None:
    """Fresh processes are measured only when something is suspect."""
    calm = Machine(random.Random(0), scatter=0.01, luck=0.001)
    judge(calm)
    assert calm.processes == 2
    slow = Machine(random.Random(0), scatter=0.01, luck=0.001, slower={"update": 1.15})
    judge(slow)
    assert slow.processes == 4


def test_what_only_the_head_cannot_run_is_an_error(
    judge: Callable[[Machine], list[Finding]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ready(self: Process) -> dict[str, Any]:
        if self._is_head:
            raise CannotRunError("no such option")
        return {"fingerprint": {"id": "here"}}

    monkeypatch.setattr(Process, "ready", ready)
    with pytest.raises(PerfError, match="head cannot run what the base can: no such option") as caught:
        judge(Machine(random.Random(0)))
    assert not isinstance(caught.value, CannotRunError)


def test_bounds_of_a_median_are_those_of_the_binomial() -> None:
    """scipy's quantile of Binomial(n, 1/2) tells which order statistics bound the median."""
    binom = pytest.importorskip("scipy.stats").binom
    for count in (8, 9, 16, 24, 25, 72):
        estimate = paired_ratio([(1.0, 1.0 + i) for i in range(count)])
        k = int(binom.ppf(0.005, count, 0.5))
        k = k if binom.cdf(k - 1, count, 0.5) * 2 <= 0.01 else k - 1
        assert (estimate.low, estimate.high) == (k, count + 1 - k), count
        assert 2 * binom.cdf(k - 1, count, 0.5) <= 0.01 < 2 * binom.cdf(k, count, 0.5)


def test_few_pairs_have_no_bounds() -> None:
    estimate = paired_ratio([(1.0, 2.0)] * 7)
    assert (estimate.ratio, estimate.low, estimate.high) == (2.0, 0.0, math.inf)
    assert time_state([(1.0, 2.0)] * 7, 1.0) == "unclear"


def test_short_phases_are_not_judged() -> None:
    assert time_state([(1e-4, 3e-4)] * 30, 1.0) == "short"
    assert time_state([(5e-3, 9e-3)] * 30, 10.0) == "short"
    assert time_state([(5e-3, 9e-3)] * 30, 1.0) == "suspect"


def test_the_rank_that_grew_most_counts() -> None:
    assert memory_state([100, 100], [100, 103]) == "suspect"
    assert memory_state([100, 100], [90, 101]) == "fine"


def test_process_pairs_must_agree() -> None:
    assert agreed(["fine"]) is False
    assert agreed(["short"]) is False
    assert agreed(["suspect"]) is None
    assert agreed(["unclear"]) is None
    assert agreed(["suspect", "fine"]) is None
    assert agreed(["suspect", "suspect"]) is True
    assert agreed(["suspect", "fine", "suspect"]) is True
    assert agreed(["suspect", "fine", "fine"]) is False


def test_baselines_are_as_loose_as_their_band() -> None:
    assert baseline_limit(1.02, 1.1) == pytest.approx(TIME_LIMIT * 1.1)
    assert baseline_limit(None, 1.1) == pytest.approx(TIME_LIMIT * 1.1)
    assert baseline_limit(None, None) is None
