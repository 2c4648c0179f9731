"""Options of the weight formats `mcore` and `mindspeed-mm`: how they are written. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mmrl_core.recipe import Positive, Spec


class McoreOptions(Spec):
    """Writing a checkpoint of Megatron: one file for each tensor-parallel rank of each pipeline stage."""

    tensor_parallel: Positive = 1
    """Ranks that share each layer."""
    pipeline_parallel: Positive = 1
    """Stages of consecutive layers."""
    layers_per_stage: list[Positive] | None = Field(default=None, min_length=1)
    """Layers of each stage when they are not all the same, such as 7,7,7,6."""
    vocabulary_multiple: Positive = 1
    """The embedding gets zero rows up to a multiple of this times tensor_parallel (Megatron's
    make-vocab-size-divisible-by, which is 128 unless a run says otherwise)."""
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """Whose layers the names are for: megatron-core's own (MindSpeed's too), or TransformerEngine's."""
    iteration: Positive | None = None
    """Write iter_NNNNNNN, from which a run goes on; otherwise `release`, which starts one."""


class MindSpeedMmOptions(Spec):
    """Writing a Wan transformer for MindSpeed-MM."""

    storage: Literal["torch", "dcp"] = "torch"
    """torch: one file a pipeline stage. dcp: torch.distributed.checkpoint, which FSDP2 training loads."""
    layers_per_stage: list[Positive] | None = Field(default=None, min_length=1)
    """Blocks of each pipeline stage, such as 15,15; with storage torch only."""
