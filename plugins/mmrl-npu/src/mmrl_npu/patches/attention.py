"""Attention as `npu_fusion_attention`: softmax(scale * q k^T, masked) v, keys and values of fewer heads allowed.

In its mask True means *left out*, the opposite of PyTorch's. Masks are [B or 1, N or 1, Sq, Skv]; with `sparse_mode` 2
one triangle of 2048 x 2048 stands for a causal mask of any size that begins at the upper left corner.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmrl_npu.patches.placement import on_npu, torch_npu

_TRIANGLE = 2048
_HEAD_DIM = 768
_NOT_OURS = ("position_bias", "cache")
"""Options of newer releases of sdpa that the operator is not asked for."""
_FULL, _CAUSAL = 0, 2
"""Values of `sparse_mode`: the mask as it is; the triangle."""
_EMPTY_ROWS = 2
"""Value of `inner_precise`: rows whose every key is left out (queries of padding) are allowed."""


def text_attention(original: Callable[..., Any]) -> Callable[..., Any]:
    """`AttentionInterface.get_interface`: where it answers with sdpa, ours, which falls back on it."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    @functools.wraps(sdpa_attention_forward)
    def fused(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """q [B, N, Sq, D], k and v [B, N', Skv, D] -> [B, Sq, N, D]."""
        shape = (query.shape[2], key.shape[2])
        plain = all(options.get(name) is None for name in _NOT_OURS)
        if not (plain and _fits(query, key, value, attention_mask, shape)):
            result: tuple[Tensor, None] = sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, is_causal, **options
            )
            return result
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        out = _attention(
            query,
            key,
            value,
            heads=query.shape[1],
            layout="BNSD",
            mask=attention_mask,
            causal=bool(causal) and attention_mask is None and shape[0] > 1,
            scale=scaling,
            dropout=dropout,
        )
        return out.transpose(1, 2).contiguous(), None

    @functools.wraps(original)
    def get_interface(self: Any, *arguments: Any, **options: Any) -> Any:
        found = original(self, *arguments, **options)
        return fused if found is sdpa_attention_forward else found

    return get_interface


def image_attention(original: Any) -> Any:
    """`_AttentionBackendRegistry.get_active_backend`, a classmethod: ours for the native backend, which is the default.
    Blocks for which a backend was chosen by name keep theirs."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    def get_active_backend(cls: Any) -> tuple[Any, Callable[..., Tensor]]:
        name, backend = original.__func__(cls)
        return name, (_native(backend) if name == AttentionBackendName.NATIVE else backend)

    return classmethod(functools.wraps(original.__func__)(get_active_backend))


def _native(backend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """q [B, Sq, N, D], k and v [B, Skv, N, D] -> [B, Sq, N, D]."""

    @functools.wraps(backend)
    def fused(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        plain = not any(options.get(name) for name in ("is_causal", "return_lse", "_parallel_config"))
        if not (plain and _fits(query, key, value, attn_mask, (query.shape[1], key.shape[1]))):
            return backend(query=query, key=key, value=value, attn_mask=attn_mask, **options)
        return _attention(
            query,
            key,
            value,
            heads=query.shape[2],
            layout="BSND",
            mask=attn_mask,
            causal=False,
            scale=options.get("scale"),
            dropout=options.get("dropout_p", 0.0),
        )

    return fused


def _fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, shape: tuple[int, int]) -> bool:
    """Whether the operator takes these; a mask only if it is boolean and has the full `shape` [Sq, Skv]."""
    masked = mask is None or (mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[-2:] == shape)
    one_kind = query.dtype == key.dtype == value.dtype and query.ndim == 4
    return on_npu(query) and masked and one_kind and query.shape[-1] <= _HEAD_DIM


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    heads: int,
    layout: str,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    dropout: float,
) -> Tensor:
    left_out = None if mask is None else (~mask).contiguous()
    if causal:
        left_out = torch.ones(_TRIANGLE, _TRIANGLE, dtype=torch.bool, device=query.device).triu(1)
    result: Tensor = torch_npu().npu_fusion_attention(
        query,
        key,
        value,
        heads,
        layout,
        atten_mask=left_out,
        scale=1.0 / math.sqrt(query.shape[-1]) if scale is None else scale,
        keep_prob=1.0 - dropout,
        sparse_mode=_CAUSAL if causal else _FULL,
        inner_precise=0 if mask is None else _EMPTY_ROWS,
    )[0]
    return result
