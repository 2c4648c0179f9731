"""Options of the device `npu`. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from mmrl_core.errors import nearest
from mmrl_core.recipe import Spec
from mmrl_npu.patches import NAMES


class NpuOptions(Spec):
    """How networks are run on an NPU."""

    patches: bool | dict[str, bool] = True
    """Changes to transformers and diffusers that use fused operators: true for those that are on by default, false for
    none, or single ones by name: `{transformers-swiglu: false, diffusers-gelu: true}`."""
    fused_adamw: bool = False
    """Use `torch.optim.AdamW(fused=True)`, one kernel for each parameter."""

    profiler_level: Literal[0, 1, 2] = 1
    """How much `torch_npu.profiler` records of a step that the recipe profiles: 0 kernels and their times, 1 also what
    keeps the cores busy and each collective, 2 also the runtime's own calls."""

    @field_validator("patches")
    @classmethod
    def _are_known(cls, patches: bool | dict[str, bool]) -> bool | dict[str, bool]:
        for name in patches if isinstance(patches, dict) else ():
            if name not in NAMES:
                raise ValueError(f"there is no patch {name!r}.{nearest(name, NAMES)} There are: {', '.join(NAMES)}")
        return patches
