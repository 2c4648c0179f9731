"""Options, checked when a recipe is read. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mmrl_core.recipe import Spec


class BrevityOptions(Spec):
    """Options of `brevity`."""

    free_words: Annotated[int, Field(ge=0)] = 0
    """Words that cost nothing."""
    half_life_words: Annotated[int, Field(ge=1)] = 50
    """Further words after which the reward has halved."""
