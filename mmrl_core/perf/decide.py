"""When a difference counts: pure functions of numbers, so that they can be tried on simulated noise.

A slowdown of `CERTAIN_TIME` or a growth of `CERTAIN_MEMORY` must be found, and equal code must be let through. Two
processes of equal code differ by some per cent for as long as they live, by where their memory happens to lie. So one
pair of processes can only make a phase suspect: fresh pairs must agree with it, and all of them together must show a
difference past a limit that lies well below what must be found.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

CERTAIN_TIME = 1.15
"""A phase that takes so many times as long is found."""
SUSPECT_TIME = 1.06
"""A pair of processes makes a phase suspect when its estimate is above it, and the lower bound above 1."""
TIME_LIMIT = 1.09
"""Of all process pairs together the estimate must be above it."""
CERTAIN_MEMORY = 1.03
"""A phase whose peak is so many times as high is found."""
MEMORY_LIMIT = 1.02
"""A peak that is more than so many times as high is suspect."""
CHANCE = 0.01
"""How often the bounds of a median miss it."""
SHORTEST_S = 2e-4
"""Shorter phases are shown and not judged: they are made of single page faults and cache misses."""
SMALLEST_SHARE = 1e-3
"""Nor are phases that are a smaller share of the step."""

State = Literal["fine", "suspect", "unclear", "short"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Of a ratio, with its bounds."""

    ratio: float
    low: float
    high: float


def paired_ratio(pairs: Sequence[tuple[float, float]]) -> Estimate:
    """Median of second / first over pairs measured next to each other, with bounds from the order of the ratios.

    The bounds hold for any distribution of noise (the number of ratios below their median is binomial). With fewer
    than 8 pairs there are none: 0 and infinity.
    """
    ratios = sorted(second / first for first, second in pairs)
    outside = _outside(len(ratios))
    low, high = (ratios[outside - 1], ratios[-outside]) if outside else (0.0, math.inf)
    return Estimate(ratio=statistics.median(ratios), low=low, high=high)


def is_short(seconds: float, step_s: float) -> bool:
    """Whether a phase is too short to be judged, in a step of `step_s`."""
    return seconds < SHORTEST_S or seconds < SMALLEST_SHARE * step_s


def time_state(pairs: Sequence[tuple[float, float]], step_s: float) -> State:
    """What pairs of (base, head) seconds of a phase say; `step_s` is what the base's whole step takes."""
    if is_short(statistics.median(first for first, _ in pairs), step_s):
        return "short"
    estimate = paired_ratio(pairs)
    if estimate.ratio > SUSPECT_TIME:
        return "suspect" if estimate.low > 1 else "unclear"
    return "fine" if estimate.high < CERTAIN_TIME else "unclear"


def memory_state(base: Sequence[int], head: Sequence[int]) -> State:
    """What peaks of a phase say, one a rank: the rank that grew most counts."""
    return "suspect" if memory_ratio(base, head) > MEMORY_LIMIT else "fine"


def memory_ratio(base: Sequence[int], head: Sequence[int]) -> float:
    """Of the rank that grew most."""
    return max(h / b for b, h in zip(base, head, strict=True))


def agreed(states: Sequence[State]) -> bool | None:
    """Whether process pairs agree that a phase is suspect: two of up to three. None: another one must say."""
    suspect, unclear = states.count("suspect"), states.count("unclear")
    if suspect >= 2:
        return True
    return None if (suspect or unclear) and len(states) - suspect - unclear < 2 else False


def baseline_limit(*bands: float | None) -> float | None:
    """The ratio of medians above which a phase is slower than a baseline measured at another time: the limit, times
    the largest A/A band of the two. None when no band is known."""
    known = [band for band in bands if band is not None]
    return TIME_LIMIT * max(known) if known else None


def _outside(count: int) -> int:
    """How many ratios may lie outside the bounds on either side: the largest k with 2 P(Binomial(count, 1/2) < k) at
    most CHANCE."""
    tail, k = 0.0, 0
    while True:
        tail += math.comb(count, k) / 2**count
        if 2 * tail > CHANCE:
            return k
        k += 1
