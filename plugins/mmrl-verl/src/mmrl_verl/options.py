"""Options of what this distribution declares, checked when a recipe is read. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

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


class VerlRewardOptions(Spec):
    """verl's reward functions. The data row's `data_source` chooses the function, `extra_info` is passed on."""

    compute_score: str | None = None
    """A function of your own with verl's arguments, as `FILE.py:FUNCTION` or `MODULE:FUNCTION`; null: verl's own
    (`default_compute_score`), which knows openai/gsm8k, lighteval/MATH, math_dapo, hiyouga/geometry3k and others."""
    data_source: str | None = None
    """For rows without a column of this name."""
    reward_kwargs: dict[str, Any] = Field(default={})
    """More keyword arguments of the function."""

    @field_validator("compute_score")
    @classmethod
    def _names_a_function(cls, value: str | None) -> str | None:
        place, _, attribute = (value or "").rpartition(":")
        if value is not None and not (place and attribute.isidentifier()):
            raise ValueError(f"compute_score {value!r}: write FILE.py:FUNCTION or MODULE:FUNCTION")
        return value
