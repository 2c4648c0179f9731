"""How far equal computations may be apart, by the precision of forward and backward. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from mmrl_core.errors import VerifyError, nearest


@dataclass(frozen=True, kw_only=True)
class Tolerances:
    """Largest differences. Those of log-probs, entropy and loss are relative to max(1, |value|); those of weights and
    gradients are relative L2 distances of one parameter's tensors."""

    start: float
    """Weights before the first update."""
    log_probs: float
    """Log-probs of the policy and of the reference."""
    entropy: float
    loss: float
    """Of the first update."""
    gradients: float
    """Of a parameter, relative to its own norm or a thousandth of the whole gradient's, whichever is larger."""
    grad_norm: float
    """Relative."""
    change: float
    """What updates changed in a parameter, beyond the rounding of its weights."""
    undecided: float
    """Elements whose gradient is below this part of their parameter's root mean square are left out of `change`."""
    after: float
    """Log-probs and loss once weights have changed."""


BY_DTYPE: Mapping[str, Tolerances] = {
    "float32": Tolerances(
        start=0.0,
        log_probs=2e-6,
        entropy=4e-6,
        loss=2e-6,
        gradients=1e-5,
        grad_norm=1e-5,
        change=1e-4,
        undecided=1e-2,
        after=1e-4,
    ),
    "float16": Tolerances(
        start=0.0,
        log_probs=1e-2,
        entropy=1e-2,
        loss=1e-2,
        gradients=2e-2,
        grad_norm=1e-2,
        change=0.2,
        undecided=0.1,
        after=0.1,
    ),
    "bfloat16": Tolerances(
        start=0.0,
        log_probs=8e-2,
        entropy=8e-2,
        loss=8e-2,
        gradients=0.15,
        grad_norm=8e-2,
        change=0.5,
        undecided=0.3,
        after=0.5,
    ),
}
"""See docs/how-to/verify.md for where they come from."""

_PRECISION = ("float64", "float32", "float16", "bfloat16")


DEEP_TENSORS = 100
"""Parameters (tensors) from which on a network counts as deep."""
DEEP_FACTOR = 10.0
"""By which its fp32 tolerances are larger: every layer adds its rounding to that of the layers below."""
_DEEPER = ("log_probs", "entropy", "loss", "gradients", "grad_norm", "change")


def coarsest(dtypes: Iterable[str]) -> str:
    """The least precise of some dtypes."""
    return max(dtypes, key=_PRECISION.index)


def tolerances(dtypes: Sequence[str], changes: Sequence[str], tensors: int = 0) -> tuple[str, Tolerances]:
    """The dtype whose tolerances apply, and these: the most precise of the combinations' own, so that another
    precision is a difference like any other.

    Args:
        dtypes: of both combinations, as in `model.dtype`.
        changes: `name=value` of single tolerances, or a dtype, whose tolerances are taken instead.
        tensors: parameters of the network.

    Raises VerifyError naming what is not understood.
    """
    chosen = min(dtypes, key=_PRECISION.index)
    words = [change for change in changes if "=" not in change]
    for word in words:
        if word not in BY_DTYPE:
            raise VerifyError(
                f"--tolerance {word}: neither NAME=VALUE nor one of {', '.join(BY_DTYPE)}.{nearest(word, BY_DTYPE)}"
            )
        chosen = word
    result = BY_DTYPE[chosen]
    if chosen == "float32" and tensors >= DEEP_TENSORS:
        result = replace(result, **{name: DEEP_FACTOR * getattr(result, name) for name in _DEEPER})
        chosen = f"{chosen} for a deep network"
    names = [field.name for field in fields(Tolerances)]
    for change in changes:
        name, given, text = change.partition("=")
        if not given:
            continue
        if name not in names:
            raise VerifyError(f"--tolerance {change}: {name!r} is none of {', '.join(names)}.{nearest(name, names)}")
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            raise VerifyError(f"--tolerance {change}: {text!r} is no number of 0 or more")
        result = replace(result, **{name: value})
    return chosen, result
