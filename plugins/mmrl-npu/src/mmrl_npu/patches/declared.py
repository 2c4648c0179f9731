"""The patches as data: what is replaced, for which versions, and why. Imports no torch.

A range of versions ends where nobody has looked yet. Each replacement leaves tensors that are not on an NPU, and inputs
outside of what the operator's documentation admits, to what stood there before.
"""

from __future__ import annotations

from mmrl_core import Patch

TORCH_NPU = ">=2.7.1,<2.15"
"""Versions of torch-npu whose operators take our calls."""
_TRANSFORMERS = ">=5.0,<5.24"
_DIFFUSERS = ">=0.36,<0.43"
_TEXT = tuple(
    (f"transformers.models.{family}.modeling_{family}", name)
    for family, name in (("llama", "Llama"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3"))
)
_FLUX = "diffusers.models.transformers.transformer_flux"
_WAN = "diffusers.models.transformers.transformer_wan"
_ATTENTION = "diffusers.models.attention"
_OPERATORS = "https://github.com/Ascend/op-plugin/tree/master/docs"


def _patch(
    name: str,
    targets: tuple[str, ...],
    replacement: str,
    reason: str,
    *,
    versions: str | None = None,
    upstream: str = _OPERATORS,
) -> Patch:
    """A patch of the distribution that its name begins with."""
    distribution = name.partition("-")[0]
    return Patch(
        name=name,
        targets=targets,
        replacement=f"mmrl_npu.patches.{replacement}",
        reason=reason,
        distribution=distribution,
        versions=versions or {"transformers": _TRANSFORMERS, "diffusers": _DIFFUSERS}[distribution],
        devices=("npu",),
        upstream=upstream,
    )


PATCHES: tuple[Patch, ...] = (
    _patch(
        "transformers-rms-norm",
        tuple(f"{module}:{name}RMSNorm.forward" for module, name in _TEXT),
        "rms_norm:text_rms_norm",
        "RMSNorm is a chain of small kernels with copies in float32; npu_rms_norm is one kernel",
    ),
    _patch(
        "transformers-swiglu",
        tuple(f"{module}:{name}MLP.forward" for module, name in _TEXT),
        "swiglu:text_swiglu",
        "SiLU and the product with its gate are two kernels, and both results are kept for backward; npu_swiglu is one",
    ),
    _patch(
        "transformers-rotary",
        tuple(f"{module}:apply_rotary_pos_emb" for module, _ in _TEXT),
        "rotary:text_rotary",
        "rotating queries and keys is a chain of small kernels; npu_rotary_mul is one for each",
    ),
    _patch(
        "transformers-attention",
        ("transformers.modeling_utils:AttentionInterface.get_interface",),
        "attention:text_attention",
        "with a mask, sdpa repeats keys and values for every query head; npu_fusion_attention takes them as they are",
        versions=">=5.5,<5.24",
    ),
    _patch(
        "diffusers-rms-norm",
        (f"{_FLUX}:FluxAttention.__init__", f"{_WAN}:WanAttention.__init__"),
        "rms_norm:image_rms_norm",
        "queries and keys of FLUX and Wan are normalised by torch.nn.RMSNorm, which is not fused; npu_rms_norm is",
    ),
    _patch(
        "diffusers-rotary",
        (f"{_FLUX}:apply_rotary_emb",),
        "rotary:image_rotary",
        "rotating queries and keys of FLUX is a chain of small kernels; npu_rotary_mul is one for each",
    ),
    _patch(
        "diffusers-rotary-layout",
        (f"{_FLUX}:get_1d_rotary_pos_embed",),
        "rotary:rotary_layout",
        "a guide for Ascend repeats the tables along their first axis, not the last, for speed: the same numbers",
        upstream="https://gitee.com/ascend/MindSpeed-MM/tree/master/examples/dancegrpo",
    ),
    _patch(
        "diffusers-attention",
        ("diffusers.models.attention_dispatch:_AttentionBackendRegistry.get_active_backend",),
        "attention:image_attention",
        "the native backend permutes queries, keys and values for sdpa; npu_fusion_attention takes them as they are",
    ),
    _patch(
        "diffusers-gelu",
        (f"{_FLUX}:FluxSingleTransformerBlock.__init__", f"{_ATTENTION}:FeedForward.__init__"),
        "gelu:image_gelu",
        "torch-npu runs PyTorch's GELU without its `approximate`; npu_gelu is told which form is meant",
    ),
)
