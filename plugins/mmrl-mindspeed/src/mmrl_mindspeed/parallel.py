"""Which ranks share the model and how: Megatron's process groups for one layout, and this rank's place in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from mmrl_core.contracts import Replica
from mmrl_core.errors import BackendError
from mmrl_core.world import World

if TYPE_CHECKING:
    from mmrl_mindspeed.options import MegatronOptions


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes and ranks of the dimensions; the groups are Megatron's. Ranks are ordered tp-dp-pp."""

    tensor: int
    tensor_rank: int
    tensor_group: ProcessGroup
    pipeline: int
    pipeline_rank: int
    pipeline_group: ProcessGroup
    data: int
    data_rank: int
    data_group: ProcessGroup
    state: dict[str, Any] = field(repr=False)
    """Megatron's global parallel state with this layout."""

    @property
    def first(self) -> bool:
        """This rank has the embedding."""
        return self.pipeline_rank == 0

    @property
    def last(self) -> bool:
        """This rank has the output layer and the loss."""
        return self.pipeline_rank == self.pipeline - 1

    @property
    def replica(self) -> Replica:
        """A replica is a TP x PP block; its root is its first rank."""
        return Replica(index=self.data_rank, count=self.data, is_root=self.tensor_rank == 0 and self.first)

    def stage_rank(self, stage: int) -> int:
        """The global rank of `stage` in this rank's pipeline."""
        return dist.get_process_group_ranks(self.pipeline_group)[stage]

    def activate(self) -> None:
        """Make this layout the one that Megatron's global functions answer for."""
        from megatron.core import parallel_state

        vars(parallel_state).update(self.state)


def check_world(options: MegatronOptions, world: World) -> None:
    """Raise BackendError when the ranks cannot be divided into replicas."""
    block = options.tensor_parallel * options.pipeline_parallel
    if world.size % block:
        raise BackendError(
            f"backend megatron: tensor_parallel {options.tensor_parallel} x pipeline_parallel "
            f"{options.pipeline_parallel} = {block} ranks hold one copy of the model, and the run has {world.size} "
            f"rank{'s' if world.size > 1 else ''}. Start a multiple of {block} ranks (launcher.processes), or choose "
            "sizes whose product divides their number"
        )


_established: dict[tuple[int, int], tuple[ProcessGroup, Layout]] = {}
"""By (tensor, pipeline): the world's group and the layout, so that a second backend makes no new groups."""


def establish(options: MegatronOptions, world: World) -> Layout:
    """Create the process groups of the options' layout, or find them, and activate it. Collective.

    Raises BackendError when the ranks cannot be divided so.
    """
    from megatron.core import parallel_state

    check_world(options, world)
    key = (options.tensor_parallel, options.pipeline_parallel)
    everyone = dist.group.WORLD
    assert everyone is not None, "the launcher joins the ranks before components are set up"
    known = _established.get(key)
    if known is None or known[0] is not everyone:
        parallel_state.destroy_model_parallel()
        # 0.12.1 leaves these of the layout before, and then looks for groups that this rank is not in
        parallel_state._EMBEDDING_GLOBAL_RANKS = None
        parallel_state._POSITION_EMBEDDING_GLOBAL_RANKS = None
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=options.tensor_parallel,
            pipeline_model_parallel_size=options.pipeline_parallel,
            create_gloo_process_groups=False,
        )
        known = _established[key] = (everyone, _described())
    known[1].activate()
    return known[1]


def _described() -> Layout:
    from megatron.core import parallel_state as state

    return Layout(
        tensor=state.get_tensor_model_parallel_world_size(),
        tensor_rank=state.get_tensor_model_parallel_rank(),
        tensor_group=state.get_tensor_model_parallel_group(),
        pipeline=state.get_pipeline_model_parallel_world_size(),
        pipeline_rank=state.get_pipeline_model_parallel_rank(),
        pipeline_group=state.get_pipeline_model_parallel_group(),
        data=state.get_data_parallel_world_size(),
        data_rank=state.get_data_parallel_rank(),
        data_group=state.get_data_parallel_group(),
        state={name: value for name, value in vars(state).items() if name.startswith("_") and name.isupper()},
    )
