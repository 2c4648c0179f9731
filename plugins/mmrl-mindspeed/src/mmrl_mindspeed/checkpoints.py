"""Saving and loading the backend's training state so that any layout can go on with it.

A folder of torch.distributed.checkpoint with, by Hugging Face name, fp32 weights (`model.`) and AdamW's moments
(`exp_avg.`, `exp_avg_sq.`), Megatron's random states by place in the model (`random.`), and `megatron.json`. Each rank
writes what it holds, and reads what it needs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from megatron.core import tensor_parallel
from torch import nn

from mmrl_core.errors import BackendError
from mmrl_mindspeed import box_planners
from mmrl_mindspeed.segments import Box, Segment, boxes, whole

if TYPE_CHECKING:
    from mmrl_core.contracts import RunContext
    from mmrl_mindspeed.box_planners import Boxes
    from mmrl_mindspeed.optimizer import MegatronAdamW
    from mmrl_mindspeed.parallel import Layout

FACTS = "megatron.json"


class Trained(Protocol):
    """What is saved: one rank's share of a network under training, and its optimizer."""

    optimizer: MegatronAdamW

    def segments(self) -> Iterator[tuple[nn.Parameter, Sequence[Segment], bool]]:
        """This rank's trained parameters, their segments, and whether this rank is the one of its replica that saves
        them (others of the replica may hold the same)."""
        ...


class Saved(Protocol):
    """The parts of the backend that are used here."""

    @property
    def context(self) -> RunContext: ...
    @property
    def layout(self) -> Layout: ...
    @property
    def trained(self) -> Trained: ...


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is not a tensor."""

    tensor_parallel: int
    pipeline_parallel: int
    optimizer: bool
    """Whether the moments are there."""
    updates: int
    """The schedule's clock."""
    skipped: int
    """Consecutive skipped updates."""
    steps: int
    """AdamW's own count, for its bias correction."""


def save(backend: Saved, directory: Path, *, optimizer: bool) -> None:
    """Write weights, random states and, when asked, the optimizer, into an empty directory. Collective."""
    directory.mkdir(parents=True, exist_ok=True)
    trained, layout, world = backend.trained, backend.layout, backend.context.world
    random = _random_boxes(layout) if layout.data_rank == 0 else {}
    box_planners.save(directory, {**_boxes(trained, layout, moments=optimizer, saving=True), **random})
    steps = world.maximum(trained.optimizer.steps_taken())
    if world.is_main:
        facts = Facts(
            tensor_parallel=layout.tensor,
            pipeline_parallel=layout.pipeline,
            optimizer=optimizer,
            updates=trained.optimizer.updates,
            skipped=trained.optimizer.skipped,
            steps=steps,
        )
        (directory / FACTS).write_text(json.dumps(asdict(facts)), encoding="utf-8")


def load(backend: Saved, directory: Path, *, optimizer: bool) -> None:
    """Restore what `save` wrote, whatever layout wrote it. Collective.

    Random states are restored in the layout that saved them; in another one they stay as the recipe's seed made them.

    Raises:
        BackendError: the optimizer is asked for and was not saved, or another backend wrote the folder.
        CheckpointError: it is of another model.
    """
    facts = _read_facts(directory)
    if optimizer and not facts.optimizer:
        raise BackendError(
            f"{directory}: this checkpoint holds no optimizer (it was written with checkpoint.save_optimizer: "
            "false). To go on with a fresh optimizer set checkpoint.load_optimizer: false"
        )
    trained, layout = backend.trained, backend.layout
    moments = optimizer and facts.steps > 0
    if moments:
        trained.optimizer.create_moments(facts.steps)
    same = (facts.tensor_parallel, facts.pipeline_parallel) == (layout.tensor, layout.pipeline)
    random = _random_boxes(layout) if same else {}
    box_planners.load(directory, {**_boxes(trained, layout, moments=moments, saving=False), **random})
    _use_random(random)
    trained.optimizer.use_main_values()
    if optimizer:
        trained.optimizer.updates, trained.optimizer.skipped = facts.updates, facts.skipped


def _read_facts(directory: Path) -> Facts:
    path = directory / FACTS
    if not path.is_file():
        raise BackendError(
            f"{directory}: the backend megatron did not write this checkpoint ({FACTS} is missing). To start "
            "from the weights of another backend, use another run_dir and set model.init_from to the checkpoint"
        )
    return Facts(**json.loads(path.read_text(encoding="utf-8")))


def _boxes(trained: Trained, layout: Layout, *, moments: bool, saving: bool) -> Boxes:
    """Everything that this rank holds, or, with `saving`, what it is the one to save."""
    found: dict[str, list[Box]] = {}
    for index, (parameter, parts, writes) in enumerate(trained.segments()):
        if saving and not writes:
            continue
        own = trained.optimizer.main_values(parameter)
        if own is None:
            continue
        # every replica holds what a distributed optimizer does not divide: they take turns
        if saving and not own.divided and index % layout.data != layout.data_rank:
            continue
        for kind, tensor in {"model": own.values, **(own.moments if moments else {})}.items():
            for box in boxes(parts, parameter.shape, tensor.detach().view(-1), own.start):
                found.setdefault(f"{kind}.{box.name}", []).append(box)
    return found


# ------------------------------------------------------------------------------------------------------ random states


def _random_boxes(layout: Layout) -> dict[str, list[Box]]:
    """Copies of the states that Megatron keeps for dropout, under this rank's place in the model."""
    place = f"{layout.pipeline_rank}.{layout.tensor_rank}"
    found = {}
    for name, state in tensor_parallel.get_cuda_rng_tracker().get_states().items():
        key = f"random.{name}.{place}"
        (segment,) = whole(key, state.shape)
        found[key] = list(boxes([segment], state.shape, state.clone().view(-1), 0))
    return found


def _use_random(loaded: dict[str, list[Box]]) -> None:
    if loaded:
        states = {key.split(".")[1]: parts[0].memory for key, parts in loaded.items()}
        tensor_parallel.get_cuda_rng_tracker().set_states(states)
