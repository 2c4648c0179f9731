"""Measures the combinations of a matrix one after the other, in rounds."""

from __future__ import annotations

import importlib.metadata
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mmrl_core.errors import PerfError
from mmrl_core.perf import machine
from mmrl_core.perf.jobs import SIZES, work
from mmrl_core.perf.matrix import Combination, Matrix
from mmrl_core.perf.results import SCHEMA, Measured, NotMeasured, Result, Round, step_row
from mmrl_core.perf.session import CannotRunError, Session, StepNumbers
from mmrl_core.perf.trees import Tree
from mmrl_core.yaml_source import RecipeSource

LIBRARIES = {"text": ("torch", "transformers"), "image": ("torch", "diffusers")}
"""Distributions whose versions shape the numbers of a modality, where they are installed."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long to measure."""

    steps: int
    """Steps of a process whose time counts."""
    warmup: int
    """Steps before them."""
    rounds: int
    """Processes of each combination: how far they differ is the noise that steps of one process do not show."""
    memory_steps: int = 2
    """Steps after them that are measured for their memory."""

    @classmethod
    def of(cls, size: str, *, steps: int | None, rounds: int) -> Effort:
        """What the size calls for."""
        return cls(steps=steps or SIZES[size].steps, warmup=SIZES[size].warmup, rounds=rounds)


Say = Callable[[str], None]


class Progress:
    """Says what is being measured, and how long the rest will take by what it has taken so far."""

    def __init__(self, total: int, say: Say) -> None:
        self._total, self._say = total, say
        self._done = 0
        self._began = time.monotonic()

    def start(self, what: str) -> None:
        """The next of the `total` parts begins."""
        left = ""
        if self._done:
            seconds = (time.monotonic() - self._began) / self._done * (self._total - self._done)
            left = f", about {_duration(seconds)} left"
        self._say(f"[{self._done + 1}/{self._total}] {what}{left}")
        self._done += 1

    def skip(self, parts: int) -> None:
        """So many of the parts will not happen."""
        self._total -= parts


def measure(matrix: Matrix, tree: Tree, effort: Effort, say: Say) -> Result:
    """Measure every combination of the matrix that can run. Raises PerfError when the machine is not one machine."""
    before = machine.load_average()
    unavailable = [NotMeasured(name=u.name, reason=u.reason) for u in matrix.unavailable]
    rounds: dict[str, list[Round]] = {}
    facts: dict[str, dict[str, Any]] = {}
    shapes: dict[str, dict[str, Any]] = {}
    flops: dict[str, float | None] = {}
    failed: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="mmrl-perf-") as scratch:
        matrix.make_models(Path(scratch))
        progress = Progress(len(matrix.combinations) * effort.rounds, say)
        for number in range(effort.rounds):
            for combination in matrix.combinations:
                name = combination.name
                if name in failed:
                    continue
                progress.start(f"{name}, process {number + 1} of {effort.rounds}")
                folder = Path(scratch) / f"{len(rounds)}-{number}-{len(failed)}"
                recipe, values = matrix.recipe(combination, folder, Path(scratch))
                try:
                    with Session(tree, recipe, matrix.overrides) as session:
                        facts[name] = session.ready()
                        shapes[name] = shape(values, recipe, matrix)
                        part, flops[name] = _round(session, effort, matrix, combination)
                        rounds.setdefault(name, []).append(part)
                except CannotRunError as error:
                    failed.add(name)
                    rounds.pop(name, None)
                    progress.skip(effort.rounds - number - 1)
                    unavailable.append(NotMeasured(name=name, reason=str(error)))
                    say(f"    cannot run: {str(error).splitlines()[0]}")
    measured = [
        Measured(
            name=c.name,
            modality=c.modality,
            model=SIZES[matrix.size].models[c.modality],
            components=list(c.components),
            versions=library_versions(c),
            ranks=facts[c.name]["ranks"],
            work=shapes[c.name],
            forward_flops=flops.get(c.name),
            peak_flops=facts[c.name]["peak_flops"],
            rounds=rounds[c.name],
        )
        for c in matrix.combinations
        if c.name in rounds
    ]
    return Result(
        schema_version=SCHEMA,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=tree.name,
        fingerprint=one_machine(facts),
        size=matrix.size,
        load_average=[before, machine.load_average()],
        measured=measured,
        unavailable=unavailable,
    )


def shape(values: Mapping[str, Any], recipe: Path, matrix: Matrix) -> dict[str, Any]:
    """What shapes the work, overrides included."""
    overridden = RecipeSource.read(recipe, list(matrix.overrides)).data
    return {**work({**values, **overridden}), "overrides": sorted(matrix.overrides)}


def library_versions(combination: Combination) -> dict[str, str]:
    """Versions of the modality's libraries."""
    found = {}
    for name in LIBRARIES[combination.modality]:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def one_machine(facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The fingerprint that all combinations share. Raises PerfError when they differ, as with other thread counts."""
    prints = {name: dict(f["fingerprint"]) for name, f in facts.items()}
    if len({p["id"] for p in prints.values()}) > 1:
        said = "; ".join(f"{name}: {p}" for name, p in prints.items())
        raise PerfError(f"combinations ran on different machines or numbers of threads, and are not one table: {said}")
    return next(iter(prints.values()), {})


def check_work(numbers: StepNumbers, combination: Combination, tokens: int) -> None:
    """Raise CannotRunError when text samples do not have exactly `tokens` new tokens: times would not compare."""
    shortest, longest = (numbers.metrics.get(f"response_length/{end}") for end in ("min", "max"))
    if combination.modality == "text" and not shortest == longest == tokens:
        raise CannotRunError(
            f"{combination.rollout} sampled {shortest} to {longest} tokens where sampling.ignore_eos asks for {tokens}"
        )


def _round(session: Session, effort: Effort, matrix: Matrix, combination: Combination) -> tuple[Round, float | None]:
    """One process; and the operations of a forward, for full fine-tuning."""
    tokens = expected_tokens(matrix)
    flops = None
    for number in range(effort.warmup):
        numbers = session.step(count=number == 0)
        check_work(numbers, combination, tokens)
        flops = flops or numbers.flops
    steps = [step_row(session.step().metrics) for _ in range(effort.steps)]
    peaks = [session.step(memory=True).memory for _ in range(effort.memory_steps)]
    return Round(steps=steps, memory=[p for p in peaks if all(p)]), flops


def expected_tokens(matrix: Matrix) -> int:
    """New tokens of a text sample, with an override of them."""
    for override in reversed(matrix.overrides):
        key, _, value = override.partition("=")
        if key.strip() == "sampling.max_new_tokens":
            return int(value)
    return matrix.tokens


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
