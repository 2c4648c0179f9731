"""Options of what this distribution declares, checked when a recipe is read. Imports no torch."""

from __future__ import annotations

from typing import Literal

from mmrl_core.recipe import Positive, Spec


class VerlFsdp2Options(Spec):
    """verl's FSDP2 engine. Every rank is a replica and holds a shard of everything."""

    micro_batch_samples: Positive = 8
    """Most samples in one forward and backward. Larger is faster and needs more memory; the result is the same."""
    remove_padding: bool = False
    """Pack the rows of a micro-batch into one sequence (verl's use_remove_padding): no work on padding. Fast with
    model.policy.attention: flash_attention_2; with sdpa it builds a mask over the whole pack."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    reshard_after_forward: bool = True
    """Free a block's gathered weights after its forward (less memory) or keep them until backward (less traffic)."""
    defer_gradient_sync: bool = True
    """Sum gradients over ranks once an update (less traffic) or after each micro-batch (less memory)."""
    entropy_chunk_tokens: Positive | None = None
    """With `remove_padding`: compute the entropy so many tokens at a time, or null: all at once."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which gradients are summed over ranks."""
    torch_compile: bool = False
    """Compile the entropy (verl's use_torch_compile); with `remove_padding` only."""
    offload: bool = False
    """Move weights and optimizer state to the host while the rollout engine works."""
