"""Paired times of two peers that took turns, and what can be said about their ratio. Standard library only."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median, quartiles and extremes of some numbers."""

    median: float
    lower_quartile: float
    upper_quartile: float
    smallest: float
    largest: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Quartiles by linear interpolation; of a single number they are the number."""
        assert values, "nothing was measured"
        low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        return cls(
            median=statistics.median(values),
            lower_quartile=low,
            upper_quartile=high,
            smallest=min(values),
            largest=max(values),
            count=len(values),
        )

    def text(self, unit: str = "", digits: int = 2) -> str:
        """One line for people."""

        def number(value: float) -> str:
            return f"{value:.{digits}f}{unit}"

        return (
            f"{number(self.median)}  (middle half {number(self.lower_quartile)} to {number(self.upper_quartile)}, "
            f"all {number(self.smallest)} to {number(self.largest)}, n = {self.count})"
        )


def summary(first: str, second: str, pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Spreads of both peers' seconds and of the ratio first / second of each pair, as plain values."""
    return {
        first: asdict(Spread.of([a for a, _ in pairs])),
        second: asdict(Spread.of([b for _, b in pairs])),
        f"{first}/{second}": asdict(Spread.of([a / b for a, b in pairs])),
    }


def keep(result: dict[str, Any], target: Path) -> None:
    """Write a result as JSON, its folder too, and say where."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {target}")
