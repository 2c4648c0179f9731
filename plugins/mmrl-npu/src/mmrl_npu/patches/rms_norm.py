"""RMSNorm as `npu_rms_norm(x, gamma, epsilon) -> (y, 1 / rms)`.

The operator wants x and gamma of one dtype, and computes in float32 inside. Mixed dtypes are left to the original.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmrl_npu.patches.instances import swap_after_init
from mmrl_npu.patches.placement import on_npu, torch_npu


def text_rms_norm(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`forward` of LlamaRMSNorm and of the classes that are alike: weight [H], variance_epsilon."""

    @functools.wraps(original)
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if not (on_npu(hidden_states) and hidden_states.dtype == self.weight.dtype):
            return original(self, hidden_states)
        return _normalised(hidden_states, self.weight, self.variance_epsilon)

    return forward


def image_rms_norm(original: Callable[..., None]) -> Callable[..., None]:
    """`__init__` of an attention block: its instances of exactly `torch.nn.RMSNorm` become fused ones."""
    return swap_after_init(original, {nn.RMSNorm: FusedRMSNorm})


class FusedRMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` of one dimension, with the same parameters, fused on an NPU while the patch is in force."""

    armed: ClassVar[bool] = False

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] to the same shape and dtype."""
        fits = len(self.normalized_shape) == 1 and self.weight is not None and self.weight.dtype == x.dtype
        if not (self.armed and on_npu(x) and fits):
            return super().forward(x)
        return _normalised(x, self.weight, torch.finfo(x.dtype).eps if self.eps is None else self.eps)


def _normalised(x: Tensor, gamma: Tensor, epsilon: float) -> Tensor:
    result: Tensor = torch_npu().npu_rms_norm(x, gamma, epsilon=epsilon)[0]
    return result
