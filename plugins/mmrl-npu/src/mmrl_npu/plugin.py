"""What this distribution declares to mmrl. Imported whenever plugins are listed, so it imports nothing heavy."""

from __future__ import annotations

from mmrl_core import Patch, hookimpl
from mmrl_npu.patches import PATCHES

mmrl_api = 1


@hookimpl
def mmrl_patches() -> list[Patch]:
    """Fused operators for transformers and diffusers; the device applies those that the recipe asks for."""
    return list(PATCHES)
