"""Gated feed-forward layers with `npu_swiglu(x, dim)`: x is halved along dim into a and b; silu(a) * b."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmrl_npu.patches.placement import on_npu, torch_npu


def text_swiglu(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`forward` of LlamaMLP and of the classes that are alike: down_proj(silu(gate_proj(x)) * up_proj(x))."""

    @functools.wraps(original)
    def forward(self: Any, x: Tensor) -> Tensor:
        if not (on_npu(x) and self.config.hidden_act == "silu"):
            return original(self, x)
        both = torch.cat((self.gate_proj(x), self.up_proj(x)), dim=-1)
        result: Tensor = self.down_proj(torch_npu().npu_swiglu(both, dim=-1))
        return result

    return forward
