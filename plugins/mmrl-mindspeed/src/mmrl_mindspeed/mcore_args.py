"""The arguments that Megatron keeps in a checkpoint, and reads the model's architecture from."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from mmrl_core.errors import ModelError
from mmrl_mindspeed.architecture import Architecture
from mmrl_mindspeed.format_options import McoreOptions


def checkpoint_args(
    arch: Architecture, options: McoreOptions, *, padded_vocab: int, dtype: torch.dtype
) -> argparse.Namespace:
    """Plain values under the names of Megatron's command line, for `--use-checkpoint-args` and its checks."""
    theta = int(arch.rope_theta) if arch.rope_theta.is_integer() else arch.rope_theta
    layers = options.layers_per_stage
    return argparse.Namespace(
        **_sizes(arch),
        seq_length=arch.max_positions,
        max_position_embeddings=arch.max_positions,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm,
        untie_embeddings_and_output_weights=not arch.tied,
        normalization="RMSNorm",
        norm_epsilon=arch.norm_eps,
        swiglu=True,
        add_bias_linear=False,
        apply_layernorm_1p=False,
        position_embedding_type="rope",
        add_position_embedding=True,
        use_rotary_position_embeddings=True,
        rotary_base=theta,
        rotary_percent=1.0,
        rotary_interleaved=False,
        **_rope_scaling(arch),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        num_experts=None,
        vocab_size=arch.vocab,
        padded_vocab_size=padded_vocab,
        make_vocab_size_divisible_by=options.vocabulary_multiple,
        tokenizer_type="HuggingFaceTokenizer",
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_mcore_models=True,
        transformer_impl=options.transformer_impl,
        tensor_model_parallel_size=options.tensor_parallel,
        pipeline_model_parallel_size=options.pipeline_parallel,
        virtual_pipeline_model_parallel_size=None,
        context_parallel_size=1,
        expert_model_parallel_size=1,
        num_layer_list=None if layers is None else ",".join(map(str, layers)),
        iteration=options.iteration or 0,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        bert_binary_head=False,
    )


def _sizes(arch: Architecture) -> dict[str, Any]:
    return {
        "num_layers": arch.layers,
        "hidden_size": arch.hidden,
        "ffn_hidden_size": arch.ffn,
        "num_attention_heads": arch.heads,
        "group_query_attention": arch.kv_heads != arch.heads,
        "num_query_groups": arch.kv_heads,
        "kv_channels": arch.head_dim,
    }


def _rope_scaling(arch: Architecture) -> dict[str, Any]:
    scaling = arch.rope_scaling
    if scaling is None or scaling["rope_type"] != "llama3":
        return {"use_rope_scaling": False}
    return {"use_rope_scaling": True, "rope_scaling_factor": float(scaling.get("factor", 8.0))}


def check_args(args: argparse.Namespace | None, arch: Architecture, where: str) -> None:
    """Raise ModelError when the arguments in a checkpoint are those of another model."""
    for name, value in _sizes(arch).items():
        stated = getattr(args, name, None)
        if name == "group_query_attention" or not isinstance(stated, int) or isinstance(stated, bool):
            continue
        if name == "num_query_groups" and stated == 1:
            continue  # Megatron's default, which stands there when group_query_attention is off
        if stated != value:
            raise ModelError(
                f"{where}: the checkpoint is of a model with {name} = {stated}; the config given for it says {value}"
            )
