"""Options of the backend `megatron`, checked when a recipe is read. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mmrl_core.recipe import Positive, Spec


class MegatronOptions(Spec):
    """Training with megatron-core. Ranks are ordered tp-dp-pp: ranks of one tensor-parallel group are neighbours."""

    tensor_parallel: Positive = 1
    """Ranks that share each layer (TP). Divides the model's attention heads and key/value heads."""
    pipeline_parallel: Positive = 1
    """Ranks that hold consecutive layers (PP), scheduled 1F1B: one forward, one backward."""
    sequence_parallel: bool = False
    """Split norms and residuals along the sequence over the tensor-parallel ranks: less memory for activations."""
    layers_per_stage: list[Positive] | None = Field(default=None, min_length=1)
    """Layers of each pipeline stage when they are not all the same, such as [7, 7, 7, 6]; null: equal stages."""
    distributed_optimizer: bool = True
    """Split fp32 weights and optimizer state over the data-parallel ranks instead of holding them on each."""
    attention: Literal["sdpa", "megatron"] = "sdpa"
    """sdpa: torch's scaled_dot_product_attention. megatron: its own DotProductAttention, which MindSpeed replaces by
    a fused one on Ascend; elsewhere it keeps a [sequence, sequence] matrix for each head."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""
    micro_batch_groups: Positive = 1
    """Groups in one forward and backward. Larger is faster and needs more memory; the result is the same. A pipeline
    needs several micro-batches to keep its stages busy."""
    micro_batch_samples: Positive | None = None
    """Most samples in one forward and backward. When set, groups may be split and `micro_batch_groups` does not
    apply."""
    offload: bool = False
    """Move weights and optimizer state to the host while the rollout engine works."""
    mindspeed: dict[str, bool | int | float | str | list[int] | list[str] | None] = Field(default={})
    """MindSpeed's own options on Ascend, by its names with underscores: `{use_flash_attn: true}`. What follows from
    the other options here (the layout) is passed on already. Other devices have no MindSpeed and do not read this."""
    virtual_pipeline: Positive | None = None
    """Interleaved pipeline stages. Not supported: the only accepted value is null; use more micro-batches."""
    context_parallel: Positive = 1
    """Ranks that share each sequence in attention. Not supported: the only accepted value is 1; use
    sequence_parallel, tensor_parallel or activation_checkpointing for long sequences."""

    @model_validator(mode="after")
    def _is_a_layout(self) -> MegatronOptions:
        if self.virtual_pipeline is not None:
            raise ValueError(
                f"virtual_pipeline: {self.virtual_pipeline} is not supported; leave it null. More micro-batches "
                "(a smaller micro_batch_groups, or micro_batch_samples) keep the stages of a pipeline busy"
            )
        if self.context_parallel != 1:
            raise ValueError(
                f"context_parallel: {self.context_parallel} is not supported: megatron-core shares a sequence only in "
                "TransformerEngine's attention. For long sequences use sequence_parallel with a larger "
                "tensor_parallel, activation_checkpointing, or micro_batch_samples: 1"
            )
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise ValueError(
                "sequence_parallel splits the sequence over the tensor-parallel ranks, and tensor_parallel is 1; "
                "set tensor_parallel to 2 or more, or leave sequence_parallel out"
            )
        if self.layers_per_stage is not None and len(self.layers_per_stage) != self.pipeline_parallel:
            raise ValueError(
                f"layers_per_stage {self.layers_per_stage} has {len(self.layers_per_stage)} numbers, but "
                f"pipeline_parallel is {self.pipeline_parallel}; give one number a stage"
            )
        return self
