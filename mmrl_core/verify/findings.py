"""What a comparison says: rows of a table, and places where the two differ. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Place:
    """One place where the two differ by more than the tolerance."""

    what: str
    """A parameter, or a sample and its action."""
    left: float
    right: float
    difference: float
    """As the tolerance measures it."""
    tolerance: float
    note: str = ""
    """More about it, for people."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    phase: str
    left: float
    """Of the first combination: a mean, a norm, a number; NaN: it has none."""
    right: float
    difference: float
    """The largest, as the tolerance measures it."""
    tolerance: float
    """For that difference."""
    place: Place | None = None
    """The first place beyond the tolerance; None: there is none."""
    beyond: int = 0
    """How many places are beyond it."""
    of: int = 1
    """Places compared."""
    unit: str = ""
    """What a place is, in the plural."""
    details: dict[str, Any] = field(default_factory=dict)
    """For the JSON report."""

    @property
    def agrees(self) -> bool:
        """Within the tolerance everywhere."""
        return self.place is None


def finite(difference: float) -> float:
    """NaN is no agreement."""
    return difference if math.isfinite(difference) else math.inf
