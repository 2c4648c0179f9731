"""Rotary embeddings with `npu_rotary_mul(x, cos, sin, rotary_mode)`: cos * x + sin * rotated(x).

`half` rotates (x1, x2) of the two halves to (-x2, x1), `interleave` those of neighbours. The operator wants one dtype,
less than 1000 rows and heads (interleave: rows times heads) and an even head dimension below 896.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmrl_npu.patches.placement import on_npu, torch_npu

_ROWS = 1000
_HEAD_DIM = 896

Pair = tuple[Tensor, Tensor]


def text_rotary(original: Callable[..., Pair]) -> Callable[..., Pair]:
    """`apply_rotary_pos_emb`: q and k [B, N, S, D] (unsqueeze_dim 2: [B, S, N, D]), cos and sin [B or 1, S, D]."""

    @functools.wraps(original)
    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Pair:
        if not (unsqueeze_dim in (1, 2) and all(_fits_half(x, cos, sin, heads=unsqueeze_dim) for x in (q, k))):
            return original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        rotate = torch_npu()
        return (
            rotate.npu_rotary_mul(q, cos, sin, rotary_mode="half"),
            rotate.npu_rotary_mul(k, cos, sin, rotary_mode="half"),
        )

    return apply_rotary_pos_emb


def image_rotary(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`apply_rotary_emb` as FLUX uses it: x [B, S, N, D], cos and sin [S, D] in float32, pairs of neighbours.

    The product is taken in float32, as the original does.
    """

    @functools.wraps(original)
    def apply_rotary_emb(x: Tensor, freqs_cis: Any, *arguments: Any, **options: Any) -> Tensor:
        if arguments or options != {"sequence_dim": 1} or not isinstance(freqs_cis, tuple) or not on_npu(x):
            return original(x, freqs_cis, *arguments, **options)
        cos, sin = (part.to(x.device)[None, :, None, :] for part in freqs_cis)
        batch, _, heads, width = x.shape
        if batch * heads >= _ROWS or width >= _HEAD_DIM or not cos.dtype == sin.dtype == torch.float32:
            return original(x, freqs_cis, *arguments, **options)
        result: Tensor = torch_npu().npu_rotary_mul(x.float(), cos, sin, rotary_mode="interleave")
        return result.to(x.dtype)

    return apply_rotary_emb


def rotary_layout(original: Callable[..., Any]) -> Callable[..., Any]:
    """`get_1d_rotary_pos_embed` for positions [S] on an NPU: (cos, sin), both [S, D] float32, neighbours equal.

    The original is asked for the form without neighbours ([cos, cos] of half the width), whose half is then repeated
    along its first axis: bit for bit the same numbers.
    """

    @functools.wraps(original)
    def get_1d_rotary_pos_embed(dim: int, pos: Any, *arguments: Any, **options: Any) -> Any:
        pairs = options.get("use_real", False) and options.get("repeat_interleave_real", True)
        if arguments or not pairs or not isinstance(pos, Tensor) or not on_npu(pos):
            return original(dim, pos, *arguments, **options)
        halves = original(dim, pos, **{**options, "repeat_interleave_real": False})
        cos, sin = (part[:, : dim // 2].T.repeat_interleave(2, dim=0).T.contiguous() for part in halves)
        return cos, sin

    return get_1d_rotary_pos_embed


def _fits_half(x: Tensor, cos: Tensor, sin: Tensor, *, heads: int) -> bool:
    """x is 4-dimensional; `heads` is the dimension of its heads."""
    return (
        on_npu(x)
        and x.dtype == cos.dtype == sin.dtype
        and x.shape[-1] == cos.shape[-1] < _HEAD_DIM
        and max(x.shape[0], x.shape[heads]) < _ROWS
    )
