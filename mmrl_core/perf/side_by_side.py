"""Two trees on one machine at one time: a process of each, taking turns step by step."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from mmrl_core.errors import PerfError
from mmrl_core.perf.decide import (
    MEMORY_LIMIT,
    TIME_LIMIT,
    Estimate,
    State,
    agreed,
    memory_ratio,
    memory_state,
    paired_ratio,
    time_state,
)
from mmrl_core.perf.jobs import PHASES, SIZES
from mmrl_core.perf.matrix import Combination, Matrix
from mmrl_core.perf.measure import check_work, expected_tokens
from mmrl_core.perf.results import step_row
from mmrl_core.perf.session import CannotRunError, Session
from mmrl_core.perf.trees import Tree

T = TypeVar("T")
Say = Callable[[str], None]
FindingState = Literal["fine", "fired", "unclear", "short"]
MEMORY_STEPS = 3
MOST_PROCESS_PAIRS = 3
LOOK_EVERY = 8
"""Pairs between looks at whether there are enough: looking after each one would find what chance offers."""


@dataclass(frozen=True, kw_only=True)
class Turns:
    """How long a pair of processes is measured."""

    pairs: int
    """Steps of each, at least."""
    most_pairs: int
    """And at most, while a phase is unclear."""
    warmup: int

    @classmethod
    def of(cls, size: str, pairs: int | None) -> Turns:
        """What the size calls for, or so many pairs."""
        count = pairs or {"tiny": 24}.get(size, 8)
        return cls(pairs=count, most_pairs=4 * count, warmup=SIZES[size].warmup)


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """Bytes of a phase, one a rank, of both."""

    base: list[int]
    head: list[int]


@dataclass(frozen=True, kw_only=True)
class ProcessPair:
    """What one pair of processes gave."""

    times: Mapping[str, Sequence[tuple[float, float]]]
    """Seconds of (base, head) by phase, as they took turns."""
    memory: Mapping[str, Peaks]
    """By phase; empty where peaks cannot be known."""

    def states(self) -> dict[tuple[str, str], State]:
        """By ("time" or "memory", phase)."""
        step = statistics.median(base for base, _ in self.times["all"])
        found: dict[tuple[str, str], State] = {("time", p): time_state(v, step) for p, v in self.times.items()}
        return found | {("memory", p): memory_state(v.base, v.head) for p, v in self.memory.items()}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What is said of one phase of one combination."""

    combination: str
    kind: str
    """time or memory."""
    phase: str
    base: float
    """Seconds or bytes (of the rank that needs most): median."""
    head: float
    estimate: Estimate
    """Of head / base. For memory the bounds are the smallest and the largest of the process pairs."""
    state: FindingState
    """fine, fired, unclear or short."""


def compare_trees(
    matrix: Matrix, combination: Combination, base: Tree, head: Tree, turns: Turns, scratch: Path, say: Say
) -> list[Finding]:
    """One combination of two trees. Fresh process pairs are measured until they agree on every phase.

    Raises CannotRunError when the base cannot run it, PerfError when the head alone cannot.
    """
    done: list[ProcessPair] = []
    while True:
        done.append(_process_pair(matrix, combination, base, head, turns, scratch / str(len(done))))
        verdicts = {key: agreed([p.states()[key] for p in done]) for key in done[0].states()}
        open_keys = (
            [] if len(done) == MOST_PROCESS_PAIRS else [key for key, verdict in verdicts.items() if verdict is None]
        )
        if not open_keys:
            return [_finding(combination.name, key, done, suspect=verdicts[key] is True) for key in verdicts]
        say("    " + ", ".join(f"{phase} ({kind})" for kind, phase in open_keys) + ": once more, in fresh processes")


def _process_pair(
    matrix: Matrix, combination: Combination, base: Tree, head: Tree, turns: Turns, folder: Path
) -> ProcessPair:
    with ExitStack() as stack:
        sessions = []
        for side, tree in (("base", base), ("head", head)):  # both start at once, and are waited for in turn
            recipe, _ = matrix.recipe(combination, folder / side, folder.parent)
            sessions.append(stack.enter_context(Session(tree, recipe, matrix.overrides)))
        first, second = sessions
        facts = [first.ready(), _of_head(head, second.ready)]
        if facts[0]["fingerprint"]["id"] != facts[1]["fingerprint"]["id"]:
            raise PerfError(f"the two trees do not run alike: {facts[0]['fingerprint']} and {facts[1]['fingerprint']}")
        both, tokens = [first, second], expected_tokens(matrix)
        for _ in range(turns.warmup):
            check_work(first.step(), combination, tokens)
            check_work(_of_head(head, second.step), combination, tokens)
        times = _take_turns(both, turns)
        rows = [[session.step(memory=True).memory for _ in range(MEMORY_STEPS)] for session in both]
    return ProcessPair(times=times, memory=_peaks(rows))


def _take_turns(sessions: Sequence[Session], turns: Turns) -> dict[str, list[tuple[float, float]]]:
    """A step of each, who begins alternating, until there are enough pairs to tell."""
    times: dict[str, list[tuple[float, float]]] = {}
    for number in range(turns.most_pairs):
        order = (0, 1) if number % 2 == 0 else (1, 0)
        rows: list[dict[str, float]] = [{}, {}]
        for side in order:
            rows[side] = step_row(sessions[side].step().metrics)
        for phase in PHASES:
            if phase in rows[0] and phase in rows[1]:
                times.setdefault(phase, []).append((rows[0][phase], rows[1][phase]))
        if number + 1 >= turns.pairs and (number + 1) % LOOK_EVERY == 0:
            step = statistics.median(base for base, _ in times["all"])
            if all(time_state(pairs, step) != "unclear" for pairs in times.values()):
                break
    return times


def _peaks(rows: Sequence[Sequence[list[dict[str, int]]]]) -> dict[str, Peaks]:
    """By phase: of each side and rank the median over the steps. `rows` is [side][step][rank]."""

    def medians(side: int, phase: str) -> list[int]:
        ranks = range(len(rows[side][0]))
        return [int(statistics.median(step[rank][phase] for step in rows[side])) for rank in ranks]

    known = [p for p in PHASES if all(p in rank for side in rows for step in side for rank in step)]
    return {phase: Peaks(base=medians(0, phase), head=medians(1, phase)) for phase in known}


def _finding(name: str, key: tuple[str, str], done: Sequence[ProcessPair], *, suspect: bool) -> Finding:
    kind, phase = key
    states = [pair.states()[key] for pair in done]
    if kind == "memory":
        peaks = [pair.memory[phase] for pair in done]
        ratios = [memory_ratio(p.base, p.head) for p in peaks]
        estimate = Estimate(ratio=statistics.median(ratios), low=min(ratios), high=max(ratios))
        base = float(statistics.median(max(p.base) for p in peaks))
        head = float(statistics.median(max(p.head) for p in peaks))
        limit = MEMORY_LIMIT
    else:
        pairs = [pair for part in done for pair in part.times[phase]]
        estimate = paired_ratio(pairs)
        base, head = (statistics.median(pair[side] for pair in pairs) for side in (0, 1))
        limit = TIME_LIMIT
    state: FindingState = "fine"
    if suspect and estimate.ratio > limit:
        state = "fired"
    elif set(states) == {"short"}:
        state = "short"
    elif states[-1] == "unclear" and "fine" not in states:
        state = "unclear"
    return Finding(combination=name, kind=kind, phase=phase, base=base, head=head, estimate=estimate, state=state)


def _of_head(head: Tree, function: Callable[[], T]) -> T:
    """What the base can do and the head cannot is an error of the change, and no combination to skip."""
    try:
        return function()
    except CannotRunError as error:
        raise PerfError(f"{head.name} cannot run what the base can: {error}") from error
