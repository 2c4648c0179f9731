"""Causal attention by torch's scaled_dot_product_attention, in the place of Megatron's core attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class CausalAttention(nn.Module):
    """Rows are padded on the right, so the causal order alone keeps real tokens from padding, and no mask is made."""

    def __init__(self, config: Any, *, scale: float, **_: Any) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """query [s, b, n, d], key and value [s, b, groups, d] -> [s, b, n * d]."""
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.permute(2, 0, 1, 3).flatten(2)


class Norm(nn.RMSNorm):
    """Megatron's RMSNorm without TransformerEngine refuses sequence parallelism, which needs no more than a mark: each
    rank normalises its part of the sequence, and gradients of marked weights are summed over the ranks."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.epsilon = eps
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> the same: in fp32, rounded before the weight is applied, as transformers does."""
        if x.dtype == torch.float32:
            return super().forward(x)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return self.weight * wide.to(x.dtype)
