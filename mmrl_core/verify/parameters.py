"""Comparing two weight streams of records, parameter by parameter: one tensor of each is in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmrl_core.verify.findings import Place, Row, finite
from mmrl_core.verify.weights import TensorFolder

NEGLIGIBLE = 1e-3
"""A parameter whose norm is less than this part of the whole stream's is compared as if it were this part: what is
left of a gradient that cancels out is rounding."""

_SAME_DIRECTION = 1.0 - 1e-6
"""Cosine above which two gradients differ in length only."""


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """One parameter of both, in double precision."""

    left: float
    """L2 norm."""
    right: float
    distance: float
    """L2 norm of the difference."""
    dot: float
    worst: str
    """The element that differs most, and both values."""
    floor: float = 0.0
    """Distance that means nothing."""


@dataclass(frozen=True, kw_only=True)
class Moved:
    """What is known of weights that updates have changed, besides the changes."""

    start: Path
    """Folder of the weights before; changes cannot be finer than their rounding."""
    dtype: torch.dtype
    """What the weights are rounded to."""
    gradients: Path
    """Folder of the gradient of the first update."""
    undecided: float
    """Adam divides a gradient by its own size, so that an element moves by the learning rate whatever its gradient, and
    where that is mere rounding, so is the direction. Elements whose gradient is below this part of the root mean square
    of their parameter's are left out."""

    def pairs(self, a: TensorFolder, b: TensorFolder, names: Sequence[str]) -> dict[str, _Pair]:
        """The changes of each parameter in both."""
        found: dict[str, _Pair] = {}
        half_ulp = torch.finfo(self.dtype).eps / 2
        with TensorFolder(self.start) as start, TensorFolder(self.gradients) as gradients:
            for name in names:
                left, right = a.read(name), b.read(name)
                if name in gradients:
                    gradient = gradients.read(name).abs()
                    decided = gradient > self.undecided * float(gradient.double().square().mean().sqrt())
                    still = gradient == 0.0  # weight decay alone moves it
                    keep = decided | still
                    left, right = torch.where(keep, left, 0.0), torch.where(keep, right, 0.0)
                found[name] = _pair(left, right, floor=half_ulp * float(start.read(name).double().norm()))
        return found


def compare_parameters(
    phase: str,
    left: Path,
    right: Path,
    names: Sequence[str],
    tolerance: float,
    *,
    backwards: bool = False,
    dtype: torch.dtype = torch.float32,
    moved: Moved | None = None,
) -> Row:
    """The relative L2 distance of every parameter of two folders.

    A distance is relative to the right one's norm, or to NEGLIGIBLE of the whole right stream's when that is larger.

    Args:
        names: the left one's parameters, in the order of the forward pass.
        backwards: the first place is the last such parameter: differences of gradients begin next to the loss.
        dtype: both are rounded to it first.
        moved: the folders hold what updates changed in weights.
    """
    with TensorFolder(left) as a, TensorFolder(right) as b:
        for name in [*names, *(other for other in b if other not in a)]:
            if name not in a or name not in b:
                return _incomparable(phase, name, f"only the {'second' if name not in a else 'first'} has it")
            if a.shape(name) != b.shape(name):
                return _incomparable(phase, name, f"shapes {list(a.shape(name))} and {list(b.shape(name))}")
        if moved is None:
            pairs = {name: _pair(a.read(name).to(dtype), b.read(name).to(dtype)) for name in names}
        else:
            pairs = moved.pairs(a, b, names)
    whole = math.sqrt(sum(pair.right**2 for pair in pairs.values() if math.isfinite(pair.right)))
    differences: dict[str, float] = {}
    places: dict[str, Place] = {}
    limits: dict[str, float] = {}
    for name, pair in pairs.items():
        scale = max(pair.right, NEGLIGIBLE * whole)
        if scale == 0.0 or not math.isfinite(scale):  # nothing but zeros on the right, or not even numbers
            scale = 1.0
        differences[name] = finite(pair.distance / scale)
        limits[name] = tolerance + pair.floor / scale
        if differences[name] > limits[name]:
            places[name] = Place(
                what=name,
                left=pair.left,
                right=pair.right,
                difference=differences[name],
                tolerance=limits[name],
                note=pair.worst,
            )
    order = list(reversed(names)) if backwards else list(names)
    shown = max(differences, key=lambda name: differences[name] / max(limits[name], 1e-30), default=None)
    return Row(
        phase=phase,
        left=math.sqrt(sum(pair.left**2 for pair in pairs.values())),
        right=whole,
        difference=differences[shown] if shown is not None else 0.0,
        tolerance=limits[shown] if shown is not None else tolerance,
        place=next((places[name] for name in order if name in places), None),
        beyond=len(places),
        of=len(names),
        unit="parameters",
        details={
            "parameters": {
                name: {
                    "left_norm": pair.left,
                    "right_norm": pair.right,
                    "difference": differences[name],
                    "tolerance": limits[name],
                }
                for name, pair in pairs.items()
            },
            "scaled": _scaled(pairs),
        },
    )


def _pair(left: Tensor, right: Tensor, floor: float = 0.0) -> _Pair:
    x, y = left.double(), right.double()
    difference = x - y
    worst = ""
    if difference.numel():
        flat = int(difference.abs().nan_to_num(torch.inf).argmax())
        place = [int(i) for i in torch.unravel_index(torch.tensor(flat), difference.shape)]
        worst = f"most at {place}: {float(x.flatten()[flat]):.8g} and {float(y.flatten()[flat]):.8g}"
    return _Pair(
        left=float(x.norm()),
        right=float(y.norm()),
        distance=float(difference.norm()),
        dot=float((x * y).sum()),
        worst=worst,
        floor=floor,
    )


def _scaled(pairs: dict[str, _Pair]) -> float | None:
    """The factor, if every parameter of the left is the right's times one and the same factor; else None."""
    ratios = []
    for pair in pairs.values():
        if pair.left == 0.0 and pair.right == 0.0:
            continue
        if not (pair.left and pair.right) or pair.dot < _SAME_DIRECTION * pair.left * pair.right:
            return None
        ratios.append(pair.left / pair.right)
    if len(ratios) < 2 or max(ratios) - min(ratios) > 1e-3 * min(ratios):
        return None
    return sum(ratios) / len(ratios)


def _incomparable(phase: str, name: str, why: str) -> Row:
    place = Place(what=name, left=math.nan, right=math.nan, difference=math.inf, tolerance=0.0, note=why)
    return Row(
        phase=phase, left=math.nan, right=math.nan, difference=math.inf, tolerance=0.0, place=place, beyond=1,
        unit="parameters",
    )  # fmt: skip
