"""Weights as torch.distributed.checkpoint stores them, under their Hugging Face names."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.state_dict_saver import save

from mmrl_core.checkpoint.dcp_reading import DcpSource, dcp_folder, first_failure
from mmrl_core.checkpoint.matching import tensor_bytes
from mmrl_core.checkpoint.model_files import copy_model_files, model_files_in
from mmrl_core.contracts import WeightFormat, WeightSource
from mmrl_core.errors import ModelError


class DcpFormat(WeightFormat):
    """`.metadata` and `*.distcp`, for any number of ranks to load; the model's config and tokenizer in `hf/`."""

    @classmethod
    def detect(cls, folder: Path) -> bool:
        return dcp_folder(folder) is not None

    @classmethod
    def open(cls, folder: Path, *, where: str, model: Path | None) -> WeightSource:
        place = dcp_folder(folder)
        if place is None:
            raise ModelError(f"{where} is no folder of torch.distributed.checkpoint: it has no file .metadata")
        return DcpSource(place, where=where, model=model_files_in(folder))

    def write(
        self, source: WeightSource, folder: Path, *, model: Path | None, progress: Callable[[int, int], None]
    ) -> None:
        write_dcp(source, {name: name for name in source.names()}, folder, progress=progress)
        copy_model_files(model, folder)


def write_dcp(
    source: WeightSource,
    names: Mapping[str, str],
    folder: Path,
    *,
    below: str | None = None,
    others: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None],
) -> None:
    """Write tensors of `source`, each read when it is its turn.

    Args:
        names: by the name to store, the name in `source`. Dots make no nesting.
        below: a key of the state dict that the tensors are below.
        others: other values of the state dict.
    """
    empty: dict[str, Any] = {
        stored: torch.empty(source.shape(name), dtype=source.dtype(name), device="meta")
        for stored, name in names.items()
    }
    prefix = f"{below}." if below else ""
    planner = _StreamingPlanner(source, {prefix + stored: name for stored, name in names.items()}, progress)
    writer = FileSystemWriter(folder, thread_count=1, per_thread_copy_ahead=0)  # one tensor after the other
    state = {**({below: empty} if below else empty), **(others or {})}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            save(state, storage_writer=writer, planner=planner, no_dist=True)
        except CheckpointException as error:
            raise first_failure(error) from error


class _StreamingPlanner(DefaultSavePlanner):
    """Plans with tensors that have no memory, and reads each one for the moment of its writing."""

    def __init__(self, source: WeightSource, name_of: Mapping[str, str], progress: Callable[[int, int], None]) -> None:
        super().__init__()
        self._source, self._name_of, self._progress = source, name_of, progress
        self._total = sum(tensor_bytes(source, name) for name in name_of.values())
        self._done = 0
        self._written: Tensor | None = None

    def resolve_data(self, write_item: WriteItem) -> Any:
        name = self._name_of.get(write_item.index.fqn)
        if name is None:
            return super().resolve_data(write_item)
        if self._written is not None:  # PyTorch keeps every tensor that it wrote until the file is complete
            self._written.untyped_storage().resize_(0)
        self._written = tensor = self._source.read(name).clone()
        self._done += tensor.nbytes
        self._progress(self._done, self._total)
        return tensor
