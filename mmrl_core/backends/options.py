"""Options of the built-in training backends. Imports no torch."""

from __future__ import annotations

from typing import Literal

from mmrl_core.recipe import Positive, Spec


class Fsdp2Options(Spec):
    """PyTorch `fully_shard`; on one rank in fp32 the plain module."""

    micro_batch_groups: Positive = 1
    """Groups in one forward and backward. Larger is faster and needs more memory; the result is the same."""
    micro_batch_samples: Positive | None = None
    """Most samples in one forward and backward. When set, groups may be split (what a group shares, such as a prompt,
    is then computed in each part) and `micro_batch_groups` does not apply."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    compile: Literal["none", "blocks", "network"] = "none"
    """What `torch.compile` compiles, for the policy flow. blocks: each kind of block. network: all of it in one piece,
    which is faster for a small network, takes longer to compile the deeper it is, and needs one rank in fp32 without
    activation checkpointing. The first forward of every number of rows takes seconds to minutes longer."""
    reshard_after_forward: bool = True
    """Free a block's gathered weights after its forward (less memory) or keep them until backward (less traffic)."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which gradients are summed over ranks."""
    offload: bool = False
    """Move weights and optimizer state to the host while the rollout engine works."""
