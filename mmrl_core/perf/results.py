"""What a measurement leaves: every step's numbers, where they come from, and what follows from them. JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from mmrl_core.errors import PerfError
from mmrl_core.metrics.throughput import mfu
from mmrl_core.perf.jobs import PHASES

SCHEMA = 1
"""Grows when files written before can no longer be read."""

RATES = ("e2e_tps", "update_tps", "vllm_tps", "perf/samples_per_second")
"""Metrics of a step that are kept beside its times, where the loop has them."""


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Round(_Stored):
    """One process: its steps in their order, without warm-up."""

    steps: list[dict[str, float]]
    """Seconds by phase, and rates, of each step."""
    memory: list[list[dict[str, int]]]
    """Peak bytes by phase, of each rank, of each step that was measured for its memory."""


class Measured(_Stored):
    """One combination."""

    name: str
    modality: Literal["text", "image"]
    model: str
    components: list[str]
    """`distribution version` of the plugins."""
    versions: dict[str, str]
    """Of the libraries that the numbers depend on most."""
    ranks: int
    work: dict[str, Any]
    """What shapes a step."""
    forward_flops: float | None = None
    """Operations that one forward over a step's samples needs, a prompt once a group; None: unknown."""
    peak_flops: float | None = None
    """Of one device, from its data sheet; None: unknown."""
    rounds: list[Round]

    def key(self) -> str:
        """Measurements with equal keys, on equal machines, are of the same work by the same libraries."""
        facts = [self.name, self.model, self.versions, self.ranks, self.work]
        return json.dumps(facts, sort_keys=True)

    def round_medians(self, phase: str) -> list[float]:
        """Median seconds of a phase in each round; empty when the phase takes no time."""
        columns = [[step[phase] for step in part.steps if phase in step] for part in self.rounds]
        return [statistics.median(column) for column in columns if column]

    def seconds(self, phase: str) -> float | None:
        """Median of the rounds' medians; None when the phase takes no time."""
        medians = self.round_medians(phase)
        return statistics.median(medians) if medians else None

    def band(self, phase: str) -> float | None:
        """How far equal processes differ: the largest ratio of two rounds' medians. None: there is one round only."""
        medians = self.round_medians(phase)
        return max(medians) / min(medians) if len(medians) > 1 else None

    def bytes(self, phase: str) -> list[int]:
        """Peak of each rank: median over the steps measured for it. Empty: it cannot be known on that machine."""
        steps = [step for part in self.rounds for step in part.memory if all(phase in rank for rank in step)]
        return [
            int(statistics.median(step[rank][phase] for step in steps)) for rank in range(self.ranks if steps else 0)
        ]

    def rate(self, name: str) -> float | None:
        """Median over all steps; None when the loop does not report it."""
        values = [step[name] for part in self.rounds for step in part.steps if name in step]
        return statistics.median(values) if values else None

    def utilisation(self) -> float | None:
        """MFU of the update, a fraction: forward and twice as much backward. None when the operations or the peak are
        unknown."""
        seconds = self.seconds("update")
        if self.forward_flops is None or seconds is None:
            return None
        return mfu(flops=3 * self.forward_flops, seconds=seconds, devices=self.ranks, peak_flops=self.peak_flops)

    def summary(self) -> dict[str, Any]:
        """What people want to read in the file; computed again when it is loaded."""
        return {
            "seconds": {p: s for p in PHASES if (s := self.seconds(p)) is not None},
            "band": {p: b for p in PHASES if (b := self.band(p)) is not None},
            "bytes": {p: peaks for p in PHASES if (peaks := self.bytes(p))},
            "rates": {name: r for name in RATES if (r := self.rate(name)) is not None},
            "mfu": self.utilisation(),
        }


class NotMeasured(_Stored):
    """A combination without numbers."""

    name: str
    reason: str


class Result(_Stored):
    """A file of `mmrl perf run`."""

    schema_version: int
    created: str
    """ISO 8601, UTC."""
    commit: str
    fingerprint: dict[str, Any]
    """Of the machine, see `mmrl_core.perf.machine`."""
    size: str
    load_average: list[float | None]
    """Before and after."""
    measured: list[Measured]
    unavailable: list[NotMeasured]

    def find(self, name: str) -> Measured | None:
        """The combination of this name."""
        return next((m for m in self.measured if m.name == name), None)

    def save(self, path: Path) -> None:
        """Write it. Raises PerfError."""
        values = self.model_dump(mode="json")
        for item, measured in zip(values["measured"], self.measured, strict=True):
            item["summary"] = measured.summary()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_json(values) + "\n", encoding="utf-8")
        except OSError as error:
            raise PerfError(f"{path}: cannot be written: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read one. Raises PerfError when it is none."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PerfError(f"{path}: cannot be read: {error}") from error
        version = values.get("schema_version") if isinstance(values, dict) else None
        if version != SCHEMA:
            raise PerfError(
                f"{path}: schema_version is {version!r}, and this mmrl reads {SCHEMA}. Measure again: mmrl perf run"
            )
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise PerfError(f"{path}: is no result of mmrl perf run: {where}: {first['msg']}") from error


def step_row(metrics: Mapping[str, float]) -> dict[str, float]:
    """What is kept of a step's metrics: seconds of the phases that took any, and rates."""
    row = {p: metrics[f"timing/{p}"] for p in PHASES if metrics.get(f"timing/{p}", 0.0) > 0}
    return row | {name: metrics[name] for name in RATES if name in metrics}


def _json(value: Any, indent: int = 0) -> str:
    """JSON with a line for each innermost mapping or list of numbers, so that a step is a line."""
    pad, inner = " " * indent, " " * (indent + 1)
    children: Sequence[Any] = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(value, dict | list) or not any(isinstance(c, dict | list) and c for c in children):
        return json.dumps(value)
    if isinstance(value, dict):
        rows = [f"{inner}{json.dumps(k)}: {_json(v, indent + 1)}" for k, v in value.items()]
        return "{\n" + ",\n".join(rows) + f"\n{pad}}}"
    return "[\n" + ",\n".join(inner + _json(v, indent + 1) for v in value) + f"\n{pad}]"
