"""Fused operators under the vendor's names, by their mathematics, on the device's ordinary ones.

Libraries take some of them as soon as a package torch_npu can be imported, whatever device they run on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["npu_fusion_attention", "npu_geglu", "npu_rms_norm", "npu_rotary_mul", "npu_swiglu"]


def npu_rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(x / rms(x) * gamma, 1 / rms(x)), both over the last dimension, computed in fp32."""
    wide = x.float()
    reciprocal = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * reciprocal * gamma.float()).to(x.dtype), reciprocal


def npu_swiglu(x: Tensor, dim: int = -1) -> Tensor:
    """silu(first half) * second half, along `dim`."""
    gate, value = x.chunk(2, dim)
    return gate * torch.sigmoid(gate) * value


def npu_geglu(x: Tensor, dim: int = -1, approximate: int = 1) -> tuple[Tensor, Tensor]:
    """(first half * gelu(second half), gelu(second half)), along `dim`; `approximate` 1 is tanh's."""
    value, gate = x.chunk(2, dim)
    active = torch.nn.functional.gelu(gate, approximate="tanh" if approximate == 1 else "none")
    return value * active, active


def npu_rotary_mul(x: Tensor, cosines: Tensor, sines: Tensor, rotary_mode: str = "half") -> Tensor:
    """Rotates pairs of the last dimension: its halves (`half`), or neighbours (`interleave`)."""
    if rotary_mode == "half":
        first, second = x.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
    else:
        assert rotary_mode == "interleave", rotary_mode
        first, second = x[..., 0::2], x[..., 1::2]
        turned = torch.stack((-second, first), -1).flatten(-2)
    return x * cosines + turned * sines


def npu_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    *,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    sparse_mode: int = 0,
) -> tuple[Tensor, ...]:
    """softmax(q k^T scale) v, computed in fp32; True in `atten_mask` is left out.

    Layouts: B batch, N heads, S sequence, D head size (`BNSD`, `BSND`), or heads and size together (`BSH`).
    `sparse_mode` 0 uses the mask as it is, 2 and 3 are causal, aligned at the first and at the last position.
    """
    assert keep_prob == 1.0, "no dropout here"
    q, k, v = (_heads_first(t, head_num, input_layout) for t in (query, key, value))
    if k.shape[1] != q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q.float() @ k.float().transpose(-1, -2) * scale
    rows, columns = scores.shape[-2:]
    if sparse_mode in (2, 3):
        shift = columns - rows if sparse_mode == 3 else 0
        later = torch.ones(rows, columns, dtype=torch.bool, device=scores.device).triu(1 + shift)
        scores = scores.masked_fill(later, -math.inf)
    elif atten_mask is not None:
        scores = scores.masked_fill(atten_mask.bool(), -math.inf)
    result = (scores.softmax(-1) @ v.float()).to(q.dtype)
    if input_layout != "BNSD":
        result = result.transpose(1, 2)
    nothing = query.new_empty(0)
    return (result.flatten(-2) if input_layout == "BSH" else result, nothing, nothing, nothing)


def _heads_first(tensor: Tensor, heads: int, layout: str) -> Tensor:
    if layout == "BNSD":
        return tensor
    if layout == "BSND":
        return tensor.transpose(1, 2)
    assert layout == "BSH", layout
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)
