"""Changes to transformers and diffusers by which networks use the fused operators of an NPU. Imports no torch."""

from __future__ import annotations

from mmrl_npu.patches.choice import DEFAULT, NAMES, apply_chosen
from mmrl_npu.patches.declared import PATCHES

__all__ = ["DEFAULT", "NAMES", "PATCHES", "apply_chosen"]
