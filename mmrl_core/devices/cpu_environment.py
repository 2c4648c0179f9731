"""What a run on a CPU should find in its environment. Imports no torch."""

from __future__ import annotations

from mmrl_core.hookspecs import EnvironmentVariable
from mmrl_core.recipe import Recipe

NEVER = str(1 << 40)
"""Bytes that are free at the end of the heap before it shrinks: more than a machine has."""


def recommend(recipe: Recipe, *, ranks: int, nodes: int) -> list[EnvironmentVariable]:
    """Have glibc keep what was freed, for any recipe. Other C libraries know neither variable.

    By default it returns large tensors to the system at once and gets them back as zeros, page by page, in every step:
    4 to 10 % of an update of SmolLM2-135M. What the largest phase of a step needs then stays with the process.
    """
    return [
        EnvironmentVariable(name="MALLOC_MMAP_MAX_", value="0", reason="large tensors come from the heap too"),
        EnvironmentVariable(
            name="MALLOC_TRIM_THRESHOLD_", value=NEVER, reason="freed memory is kept for the next step"
        ),
    ]
