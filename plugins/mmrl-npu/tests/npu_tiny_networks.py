"""Tiny networks of the families that the patches are for, with inputs, in float32 and with odd sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, WanTransformer3DModel
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family."""

    build: Callable[[], nn.Module]
    """A network with random weights; the same at every call after the same seed."""
    inputs: Callable[[], dict[str, Any]]
    """Keyword arguments of its forward."""
    default: dict[str, int]
    """Operators that a forward of it runs under the default patches -> how often."""
    all: dict[str, int]
    """The same under all patches."""


def output(network: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The network's answer: logits, or the predicted sample."""
    answer = network(**inputs)
    result: Tensor = answer.logits if hasattr(answer, "logits") else answer.sample
    return result


def _text(config: type, model: type) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        extra = {"head_dim": 12} if config is Qwen3Config else {}
        network: nn.Module = model(
            config(
                vocab_size=61,
                hidden_size=48,
                intermediate_size=72,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                attn_implementation="sdpa",
                **extra,
            )
        )
        return _spread(network)

    return build


def _tokens() -> dict[str, Any]:
    """Two rows, the first padded on the left, so that some queries have no key to look at."""
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    return {
        "input_ids": torch.randint(3, 61, (2, 11)),
        "attention_mask": mask,
        "position_ids": positions,
        "use_cache": False,
    }


def _flux() -> nn.Module:
    return _spread(
        FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=20,
            axes_dims_rope=(4, 4, 8),
        )
    )


def _flux_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 15, 4),
        "encoder_hidden_states": torch.randn(2, 7, 24),
        "pooled_projections": torch.randn(2, 20),
        "timestep": torch.rand(2),
        "img_ids": torch.randint(0, 5, (15, 3)).float(),
        "txt_ids": torch.zeros(7, 3),
    }


def _sd3() -> nn.Module:
    return _spread(
        SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=3,
            joint_attention_dim=20,
            caption_projection_dim=24,
            pooled_projection_dim=28,
            out_channels=4,
            pos_embed_max_size=8,
            qk_norm="rms_norm",
        )
    )


def _sd3_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 4, 8, 6),
        "encoder_hidden_states": torch.randn(2, 5, 20),
        "pooled_projections": torch.randn(2, 28),
        "timestep": torch.rand(2) * 1000,
    }


def _wan() -> nn.Module:
    return _spread(
        WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=20,
            freq_dim=16,
            ffn_dim=40,
            num_layers=2,
            rope_max_seq_len=16,
        )
    )


def _wan_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 4, 3, 4, 6),
        "encoder_hidden_states": torch.randn(2, 5, 20),
        "timestep": torch.randint(0, 1000, (2,)),
    }


def _spread(network: nn.Module) -> nn.Module:
    """Give every parameter a spread of its own: norms with weights other than 1, biases other than 0."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


def _text_family(config: type, model: type, norms: int) -> Family:
    default = {"npu_rms_norm": norms, "npu_swiglu": 2, "npu_rotary_mul": 4}
    return Family(
        build=_text(config, model),
        inputs=_tokens,
        default=default,
        all={**default, "npu_fusion_attention": 2},
    )


FAMILIES: dict[str, Family] = {
    "llama": _text_family(LlamaConfig, LlamaForCausalLM, 5),
    "qwen2": _text_family(Qwen2Config, Qwen2ForCausalLM, 5),
    "qwen3": _text_family(Qwen3Config, Qwen3ForCausalLM, 9),
    "flux": Family(
        build=_flux,
        inputs=_flux_inputs,
        default={"npu_rms_norm": 8},
        all={"npu_rms_norm": 8, "npu_rotary_mul": 6, "npu_fusion_attention": 3, "npu_gelu": 4},
    ),
    "sd3": Family(build=_sd3, inputs=_sd3_inputs, default={}, all={"npu_gelu": 3}),
    "wan": Family(
        build=_wan,
        inputs=_wan_inputs,
        default={"npu_rms_norm": 8},
        all={"npu_rms_norm": 8, "npu_fusion_attention": 4, "npu_gelu": 2},
    ),
}
