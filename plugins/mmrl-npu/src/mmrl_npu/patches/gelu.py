"""GELU as `npu_gelu(x, approximate)`, in the feed-forward layers of diffusion transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from diffusers.models.activations import GELU
from torch import Tensor, nn

from mmrl_npu.patches.instances import swap_after_init
from mmrl_npu.patches.placement import on_npu, torch_npu


def image_gelu(original: Callable[..., None]) -> Callable[..., None]:
    """`__init__` of a block: instances of exactly `torch.nn.GELU` and of diffusers' GELU become fused ones."""
    return swap_after_init(original, {nn.GELU: FusedGELU, GELU: FusedProjectedGELU})


class FusedGELU(nn.GELU):
    """`torch.nn.GELU`, fused on an NPU while the patch is in force."""

    armed: ClassVar[bool] = False

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise; shape and dtype stay."""
        if not (self.armed and on_npu(x)):
            return super().forward(x)
        return _gelu(x, self.approximate)


class FusedProjectedGELU(GELU):  # type: ignore[misc]
    """diffusers' projection with a GELU behind it, fused on an NPU while the patch is in force."""

    armed: ClassVar[bool] = False

    def gelu(self, gate: Tensor) -> Tensor:
        """Elementwise; shape and dtype stay."""
        if not (self.armed and on_npu(gate)):
            result: Tensor = super().gelu(gate)
            return result
        return _gelu(gate, self.approximate)


def _gelu(x: Tensor, approximate: str) -> Tensor:
    result: Tensor = torch_npu().npu_gelu(x, approximate=approximate)
    return result
