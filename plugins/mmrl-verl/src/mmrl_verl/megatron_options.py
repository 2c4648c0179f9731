"""Options of the backends on verl's Megatron and MindSpeed engines, checked when a recipe is read. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mmrl_core.recipe import Positive, Spec

OWN = {
    "tensor_model_parallel_size": "tensor_parallel",
    "pipeline_model_parallel_size": "pipeline_parallel",
    "sequence_parallel": "sequence_parallel",
    "recompute_granularity": "activation_checkpointing",
    "recompute_method": "activation_checkpointing",
    "recompute_num_layers": "activation_checkpointing",
}
"""Fields of Megatron's TransformerConfig that have an option here."""


class VerlMegatronOptions(Spec):
    """verl's Megatron engine, or on Ascend its MindSpeed engine. A replica is tensor_parallel x pipeline_parallel
    ranks."""

    tensor_parallel: Positive = 1
    """Ranks that share each layer (TP). Divides the model's attention heads and key/value heads."""
    pipeline_parallel: Positive = 1
    """Ranks that hold consecutive layers (PP)."""
    sequence_parallel: bool = False
    """Split norms and residuals along the sequence over the tensor-parallel ranks: less memory for activations."""
    distributed_optimizer: bool = True
    """Split fp32 weights and optimizer state over the replicas instead of holding them in each."""
    micro_batch_samples: Positive = 8
    """Most samples in one forward and backward. Larger is faster and needs more memory; the result is the same. A
    pipeline needs several micro-batches to keep its stages busy."""
    remove_padding: bool = True
    """Pack the rows of a micro-batch into one sequence (verl's use_remove_padding): no work on padding. Needs an
    attention for packed sequences: TransformerEngine's, or MindSpeed's."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""
    entropy_chunk_tokens: Positive | None = None
    """Compute the entropy so many tokens at a time, or null: all at once."""
    offload: bool = False
    """Move weights, gradients and optimizer state to the host while the rollout engine works."""
    bridge: Literal["mbridge", "megatron-bridge"] = "mbridge"
    """What builds Megatron's model from a Hugging Face folder and names its weights. `mbridge` is a small package and
    verl calls it legacy; `megatron-bridge` is verl's default, with many requirements of its own."""
    transformer: dict[str, bool | int | float | str | None] = Field(default={})
    """More fields of Megatron's TransformerConfig by its own names (verl's override_transformer_config), such as
    `{attention_backend: flash}`. On Ascend MindSpeed's options too: `{use_flash_attn: true}`."""

    @model_validator(mode="after")
    def _is_a_layout(self) -> VerlMegatronOptions:
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise ValueError(
                "sequence_parallel splits the sequence over the tensor-parallel ranks, and tensor_parallel is 1; "
                "set tensor_parallel to 2 or more, or leave sequence_parallel out"
            )
        clash = next((name for name in self.transformer if name in OWN), None)
        if clash is not None:
            raise ValueError(f"transformer.{clash} follows from the option {OWN[clash]}; set that instead")
        return self
