"""Saving and loading boxes of tensors with torch.distributed.checkpoint: each rank its own, in place, not gathered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from mmrl_core.errors import CheckpointError
from mmrl_mindspeed.segments import Box

Boxes = Mapping[str, Sequence[Box]]
"""By the key in the checkpoint; a dot ends the key's first word (`model.`), the rest is the tensor's name."""


def save(directory: Path, boxes: Boxes) -> None:
    """Write every rank's boxes, which must tile the tensors without overlap. Collective."""
    state_dict_saver.save({}, checkpoint_id=str(directory), planner=_SaveBoxes(boxes))


def load(directory: Path, boxes: Boxes) -> None:
    """Fill every rank's boxes. Collective.

    Raises:
        CheckpointError: the checkpoint has no such tensor, or one of another shape.
    """
    _check(directory, boxes)
    state_dict_loader.load({}, checkpoint_id=str(directory), planner=_LoadBoxes(boxes))


def keys(directory: Path) -> frozenset[str]:
    """The keys that a checkpoint holds."""
    return frozenset(FileSystemReader(directory).read_metadata().state_dict_metadata)


def _check(directory: Path, boxes: Boxes) -> None:
    held = FileSystemReader(directory).read_metadata().state_dict_metadata
    for key, parts in boxes.items():
        found = held.get(key)
        if not isinstance(found, TensorStorageMetadata):
            raise CheckpointError(f"{directory}: it holds no tensor {key!r}; it is of another model")
        for box in parts:
            if tuple(found.size) != box.shape:
                raise CheckpointError(
                    f"{directory}: {key} has shape {tuple(found.size)}, and this model's is {box.shape}; it is of "
                    "another model"
                )


class _SaveBoxes(DefaultSavePlanner):
    def __init__(self, boxes: Boxes) -> None:
        super().__init__()
        self._boxes = boxes
        self._memory = _by_offset(boxes)

    def create_local_plan(self) -> SavePlan:
        items = [_write_item(key, box) for key, parts in self._boxes.items() for box in parts]
        # how readers that want nested dictionaries split the keys
        nested = {key: tuple(key.split(".", 1)) for key in self._boxes}
        self.plan = SavePlan(items, planner_data=nested)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._memory[index.fqn, index.offset]


class _LoadBoxes(DefaultLoadPlanner):
    def __init__(self, boxes: Boxes) -> None:
        super().__init__()
        self._boxes = boxes
        self._memory = _by_offset(boxes)

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        for key, parts in self._boxes.items():
            stored = self.metadata.state_dict_metadata[key]
            assert isinstance(stored, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(key, stored, [_chunk(box) for box in parts])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._memory[index.fqn, index.offset]


def _by_offset(boxes: Boxes) -> dict[tuple[str, Any], Tensor]:
    return {(key, torch.Size(box.offsets)): box.memory.detach() for key, parts in boxes.items() for box in parts}


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(box.offsets), sizes=box.memory.size())


def _write_item(key: str, box: Box) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(key, torch.Size(box.offsets)),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=_chunk(box),
            properties=TensorProperties.create_from_tensor(box.memory.detach()),
            size=torch.Size(box.shape),
        ),
    )
