"""Comparing two records, phase by phase, in the order in which a step computes things.

Weight streams are read one tensor at a time; nothing is held that grows with the model beside one parameter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmrl_core.errors import VerifyError
from mmrl_core.verify.findings import Place, Row, finite
from mmrl_core.verify.job import GRADIENTS, NUMBERS, START, UPDATES_PER_STEP, change_folder, read_facts
from mmrl_core.verify.parameters import Moved, compare_parameters
from mmrl_core.verify.tolerances import Tolerances, coarsest, tolerances


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The whole table."""

    left: dict[str, Any]
    right: dict[str, Any]
    """What `record.json` says of each."""
    dtype: str
    """Whose tolerances applied."""
    tolerances: Tolerances
    rows: list[Row]
    hint: str
    """What the differences look like, or nothing."""

    @property
    def first(self) -> Row | None:
        """The first phase that differs."""
        return next((row for row in self.rows if not row.agrees), None)


def compare(left: Path, right: Path, changes: Sequence[str] = ()) -> Comparison:
    """Compare two complete records of one batch; `changes` as for `tolerances`.

    Raises VerifyError when one is no record, is damaged, or they do not belong together.
    """
    a, b = read_facts(left), read_facts(right)
    if a["batch"] != b["batch"]:
        raise VerifyError(
            f"{left} and {right} are records of different batches. Record the second with --rollouts {left}"
        )
    for name, words in (("steps", "--updates"), ("form", "model.lora on one side only; the number of")):
        if a[name] != b[name]:
            raise VerifyError(f"{left} and {right} cannot be compared: {words} {name} differs, {a[name]} and {b[name]}")
    dtype, limits = tolerances((a["dtype"], b["dtype"]), changes, len(a["names"][START]))
    numbers = _numbers(left), _numbers(right)
    # a backend may export the weights that it computes with, or the more precise ones that it trains
    weights: torch.dtype = getattr(torch, coarsest((a["weights"], b["weights"])))
    rows = [
        compare_parameters("start weights", left / START, right / START, a["names"][START], limits.start, dtype=weights)
    ]
    rows += [_engine_row(facts, side) for facts, side in ((a, "first"), (b, "second")) if facts["engine"]]
    rows.append(_number_row("log-probs", "log_probs", numbers, a, limits.log_probs))
    if any(bool(side["entropy"].any()) for side in numbers if "entropy" in side):
        rows.append(_number_row("entropy", "entropy", numbers, a, limits.entropy))
    if any("reference" in side for side in numbers):
        rows.append(_number_row("reference log-probs", "reference", numbers, a, limits.log_probs))
    rows.append(_scalar_row("loss", "loss", a, b, 0, limits.loss, relative=False))
    gradients = compare_parameters(
        "gradients", left / GRADIENTS, right / GRADIENTS, a["names"][GRADIENTS], limits.gradients, backwards=True
    )
    rows += [gradients, _scalar_row("gradient norm", "grad_norm", a, b, 0, limits.grad_norm, relative=True)]
    for step in range(1, a["steps"] + 1):
        rows += _step_rows(left, right, a, b, numbers, step, limits, weights)
    return Comparison(left=a, right=b, dtype=dtype, tolerances=limits, rows=rows, hint=_hint(gradients, rows, a, b))


def _step_rows(
    left: Path,
    right: Path,
    a: dict[str, Any],
    b: dict[str, Any],
    numbers: tuple[dict[str, Tensor], dict[str, Tensor]],
    step: int,
    limits: Tolerances,
    weights: torch.dtype,
) -> list[Row]:
    updates = step * UPDATES_PER_STEP
    name = change_folder(step)
    return [
        _scalar_row(f"loss, update {updates}", "loss", a, b, updates - 1, limits.after, relative=False),
        compare_parameters(
            f"weight change, {updates} updates",
            left / name,
            right / name,
            a["names"][name],
            limits.change,
            backwards=True,
            moved=Moved(start=right / START, dtype=weights, gradients=right / GRADIENTS, undecided=limits.undecided),
        ),
        _number_row(f"log-probs, {updates} updates", f"log_probs.{step}", numbers, a, limits.after),
    ]


def _numbers(folder: Path) -> dict[str, Tensor]:
    try:
        numbers: dict[str, Tensor] = load_file(folder / NUMBERS)
    except (OSError, SafetensorError) as error:
        raise VerifyError(f"{folder / NUMBERS}: missing or damaged: {error}. Record it again") from error
    return numbers


def _number_row(
    phase: str,
    name: str,
    numbers: tuple[dict[str, Tensor], dict[str, Tensor]],
    facts: dict[str, Any],
    tolerance: float,
) -> Row:
    """[B, T] values where the mask is set. The first place is that of the lowest row, then the earliest action."""
    left, right = (side.get(name) for side in numbers)
    place: Place | None
    mask = numbers[0]["mask"]
    if left is None or right is None:
        present = left if left is not None else right
        assert present is not None
        place = Place(
            what="only one of the two has it", left=math.nan, right=math.nan, difference=math.inf, tolerance=0
        )
        mean = float(present[mask].mean())
        return Row(
            phase=phase,
            left=math.nan if left is None else mean,
            right=math.nan if right is None else mean,
            difference=math.inf,
            tolerance=tolerance,
            place=place,
            beyond=1,
        )
    place = None
    x, y = left.double(), right.double()
    difference = (x - y).abs() / y.abs().clamp_min(1.0)
    difference = torch.where(difference.isfinite() | ~mask, difference, torch.inf)
    difference = torch.where(mask, difference, 0.0)
    beyond = difference > tolerance
    if bool(beyond.any()):
        row, action = divmod(int(beyond.flatten().int().argmax()), mask.shape[1])
        ids = facts["rows"][row]
        place = Place(
            what=f"sample {ids['sample']} (prompt {ids['group']}), action {action}",
            left=float(x[row, action]),
            right=float(y[row, action]),
            difference=float(difference[row, action]),
            tolerance=tolerance,
        )
    return Row(
        phase=phase,
        left=float(x[mask].mean()),
        right=float(y[mask].mean()),
        difference=float(difference.max()),
        tolerance=tolerance,
        place=place,
        beyond=int(beyond.sum()),
        of=int(mask.sum()),
        unit="actions",
        details={"mean_difference": float((x - y).abs()[mask].mean())},
    )


def _scalar_row(
    phase: str, name: str, a: dict[str, Any], b: dict[str, Any], update: int, tolerance: float, *, relative: bool
) -> Row:
    """One metric of one update. Not `relative`: to the larger of 1 and the value."""
    x, y = a["updates"][update].get(name), b["updates"][update].get(name)
    x, y = (math.nan if value is None else float(value) for value in (x, y))
    scale = max(abs(y), 1e-30) if relative else max(abs(y), 1.0)
    difference = finite(abs(x - y) / scale)
    place = None
    if difference > tolerance:
        place = Place(what=f"update {update + 1}", left=x, right=y, difference=difference, tolerance=tolerance)
    return Row(
        phase=phase, left=x, right=y, difference=difference, tolerance=tolerance, place=place, beyond=int(bool(place))
    )


def _engine_row(facts: dict[str, Any], side: str) -> Row:
    """A rollout engine's log-probs against its own combination's training log-probs, by what the engine declares."""
    engine = facts["engine"]
    sampling = facts["combination"]["sampling"]
    metrics, where = engine["metrics"], engine["place"]
    largest = finite(metrics["mismatch/log_prob_diff_max"])
    temperature = sampling.get("temperature", 1.0)
    reasons = []
    if engine["truncation_renormalised"]:
        reasons.append("they are of the truncated distribution")
    if not engine["temperature_applied"] and temperature not in (0.0, 1.0):
        reasons.append("the temperature is not in them")
    tolerance = math.inf if reasons else engine["tolerance"]
    place = None
    if largest > tolerance:
        place = Place(
            what=f"sample {where['sample']} (prompt {where['group']}), action {where['action']}",
            left=where["engine"],
            right=where["training"],
            difference=largest,
            tolerance=tolerance,
            note="left: the engine's log-prob; right: the training network's",
        )
    return Row(
        phase=f"engine {engine['name']} ({side})",
        left=where["engine"],
        right=where["training"],
        difference=largest,
        tolerance=tolerance,
        place=place,
        beyond=int(place is not None),
        details={"metrics": metrics, "not_compared": "; ".join(reasons)},
    )


def _hint(gradients: Row, rows: Sequence[Row], a: dict[str, Any], b: dict[str, Any]) -> str:
    """What kind of mistake the differences look like, where they say so."""
    before = [row for row in rows[: rows.index(gradients)] if not row.agrees]
    if before or gradients.agrees:
        return ""
    factor = gradients.details.get("scaled")
    if factor is None:
        return ""
    text = f"every gradient of the first is {factor:.6g} times the second's"
    for count in sorted({a["replicas"], b["replicas"], a["world"], b["world"]} - {1}):
        if math.isclose(factor, count, rel_tol=1e-3) or math.isclose(factor, 1 / count, rel_tol=1e-3):
            return f"{text}: one of them averages over {count} ranks where gradients are to be summed"
    return text
