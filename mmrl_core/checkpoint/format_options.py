"""Options of the built-in weight formats: how they are written. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mmrl_core.recipe import Spec


class HuggingFaceOptions(Spec):
    """Writing safetensors files."""

    shard_gb: Annotated[float, Field(gt=0)] = 4.0
    """Largest file, in units of 2^30 bytes. More weights go into numbered files with an index."""
