"""Options, checked when a recipe is read. Imports no torch."""

from __future__ import annotations

from pydantic import Field

from mmrl_core.recipe import Spec


class Options(Spec):
    """Options of `changeme`."""

    word: str = Field(default="please", min_length=1)
    """CHANGEME: every field has a line like this one; it becomes the documentation."""
