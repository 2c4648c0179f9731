"""One pipeline stage of a Megatron GPTModel, made from an `Architecture`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mmrl_core.errors import BackendError
from mmrl_mindspeed import layout as naming
from mmrl_mindspeed.architecture import Architecture
from mmrl_mindspeed.attention import CausalAttention, Norm
from mmrl_mindspeed.layout import Weight, padded_vocabulary, stage_of
from mmrl_mindspeed.parallel import Layout
from mmrl_mindspeed.rope import Rotary

if TYPE_CHECKING:
    from mmrl_mindspeed.options import MegatronOptions


class Stage(GPTModel):  # type: ignore[misc]
    """A GPTModel whose last stage ends with hidden states: logits are made of chosen tokens only, elsewhere."""

    post_process: bool

    def _postprocess(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """Hidden states [s, b, H]."""
        hidden: Tensor
        if hasattr(GPTModel, "_postprocess"):
            hidden = super().forward(*arguments, **named)
            return hidden
        # megatron-core before 0.13 has no such step to replace: it goes on to logits where this says so
        last: bool = self.post_process
        self.post_process = False
        try:
            hidden = super().forward(*arguments, **named)
        finally:
            self.post_process = last
        return hidden

    def head_weight(self) -> Tensor:
        """[padded vocabulary / TP, H], on the last stage."""
        shared = self.share_embeddings_and_output_weights
        weight: Tensor = self.shared_embedding_or_output_weight() if shared else self.output_layer.weight
        return weight


def transformer_config(
    arch: Architecture, layout: Layout, options: MegatronOptions, dtype: torch.dtype, *, deterministic: bool
) -> TransformerConfig:
    """Megatron's config: nothing fused, no dropout, gradients summed and never divided."""
    recompute: dict[str, Any] = {}
    if options.activation_checkpointing:
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        num_layers=arch.layers,
        hidden_size=arch.hidden,
        ffn_hidden_size=arch.ffn,
        num_attention_heads=arch.heads,
        num_query_groups=arch.kv_heads,
        kv_channels=arch.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_eps,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # weights come from a checkpoint, so none are drawn
        perform_initialization=False,
        use_cpu_initialization=True,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        # attention scores in fp32 where Megatron makes them
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        sequence_parallel=options.sequence_parallel,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # no experts here, but another value forbids the line above
        # with it neither the loss nor a gradient is divided by micro-batches or replicas
        calculate_per_token_loss=True,
        deterministic_mode=deterministic,
        **recompute,
    )


def build(
    arch: Architecture,
    layout: Layout,
    options: MegatronOptions,
    rotary: Rotary,
    dtype: torch.dtype,
    device: torch.device,
    *,
    stages: Sequence[range],
    deterministic: bool,
) -> Stage:
    """This rank's part of the model on `device`, its weights not yet set."""
    config = transformer_config(arch, layout, options, dtype, deterministic=deterministic)
    stage = Stage(
        config,
        TransformerBlockSubmodules(
            layer_specs=[_layer(arch, options, rotary)] * len(stages[layout.pipeline_rank]),
            layer_norm=Norm,
        ),
        vocab_size=padded_vocabulary(arch.vocab, layout.tensor),
        max_sequence_length=arch.max_positions,
        pre_process=layout.first,
        post_process=layout.last,
        parallel_output=True,
        share_embeddings_and_output_weights=arch.tied,
        position_embedding_type="rope",
        rotary_base=arch.rope_theta,
    )
    stage.rotary_pos_emb.inv_freq = rotary.frequencies
    stage.to(device)
    for weight, parameter in named_shards(stage, arch, layout, stages):
        # Megatron marks what it draws at random; grad norms count unmarked parameters on one rank only
        parameter.tensor_model_parallel = weight.kind != "replicated"  # type: ignore[attr-defined]
    return stage


def _layer(arch: Architecture, options: MegatronOptions, rotary: Rotary) -> ModuleSpec:
    spec = get_gpt_layer_local_spec(qk_layernorm=arch.qk_norm, normalization="RMSNorm")
    parts = spec.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = Norm
    attention = parts.self_attention.submodules
    if arch.qk_norm:
        attention.q_layernorm = attention.k_layernorm = Norm
    if options.attention == "sdpa":
        scale = rotary.factor**2 / math.sqrt(arch.head_dim)
        attention.core_attention = ModuleSpec(module=CausalAttention, params={"scale": scale})
    elif rotary.factor != 1.0:
        raise BackendError(
            f"the model's rope_scaling multiplies attention scores by {rotary.factor**2:.4g} (yarn), which "
            "backend.attention: megatron cannot; use attention: sdpa"
        )
    return spec


def named_shards(
    stage: nn.Module, arch: Architecture, layout: Layout, stages: Sequence[range]
) -> Iterator[tuple[Weight, nn.Parameter]]:
    """This rank's parameters, each with what it is a part of, in the model's order."""
    parameters = dict(stage.named_parameters())
    for weight in naming.weights(arch, pipeline_parallel=layout.pipeline):
        if stage_of(weight, stages) == layout.pipeline_rank:
            yield weight, parameters.pop(_local_name(weight, stages[layout.pipeline_rank]))
    assert not parameters, f"parameters of no name: {sorted(parameters)[:3]}"


def _local_name(weight: Weight, layers: range) -> str:
    if weight.layer is None:
        return weight.name
    return weight.name.replace(f"layers.{weight.layer}.", f"layers.{weight.layer - layers.start}.", 1)
