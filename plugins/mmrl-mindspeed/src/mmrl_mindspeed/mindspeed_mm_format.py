"""Wan transformers as MindSpeed-MM stores them: its own names, in files of Megatron's kind or in DCP."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmrl_core.checkpoint.dcp_format import write_dcp
from mmrl_core.checkpoint.dcp_reading import DcpSource
from mmrl_core.checkpoint.matching import tensor_bytes
from mmrl_core.checkpoint.model_files import copy_model_files, model_files_in
from mmrl_core.contracts import WeightFormat, WeightSource
from mmrl_core.errors import ModelError
from mmrl_mindspeed.format_options import MindSpeedMmOptions
from mmrl_mindspeed.layout import stage_layers
from mmrl_mindspeed.rank_folders import (
    LATEST,
    RELEASE,
    RankFiles,
    first_file,
    iteration_folder,
    rank_folder,
    read_rank_files,
    save_rank_file,
)
from mmrl_mindspeed.torch_files import StoredTensor, read_torch_file
from mmrl_mindspeed.wan_names import block_of, in_block, is_wan, prefix_of, to_diffusers, to_mindspeed

CHECKPOINT_VERSION = 3.0


class MindSpeedMmFormat(WeightFormat):
    """`latest_checkpointed_iteration.txt` and `release/`, holding `mp_rank_00[_YYY]/model_optim_rng.pt` or DCP files;
    the config in `hf/`."""

    options: MindSpeedMmOptions

    @classmethod
    def detect(cls, folder: Path) -> bool:
        place = iteration_folder(folder)
        if place is not None and place != folder and (place / ".metadata").is_file():
            try:
                return is_wan(DcpSource(place, where="", model=None).names())
            except ModelError:
                return False
        file = first_file(folder)
        if file is None:
            return False
        try:
            content = read_torch_file(file, "")
        except ModelError:
            return False
        return isinstance(content, dict) and is_wan(content.get("model"))

    @classmethod
    def open(cls, folder: Path, *, where: str, model: Path | None) -> WeightSource:
        stored = model_files_in(folder)
        place = iteration_folder(folder)
        if place is not None and (place / ".metadata").is_file():
            return _renamed(DcpSource(place, where=where, model=stored))
        return _RankSource(read_rank_files(folder, where), where=where, model=stored)

    def write(
        self, source: WeightSource, folder: Path, *, model: Path | None, progress: Callable[[int, int], None]
    ) -> None:
        names = {to_mindspeed(name, source.where): name for name in source.names()}
        stages = self._stages(names, source.where)
        if self.options.storage == "dcp":
            place = folder / RELEASE
            place.mkdir()
            others = {"checkpoint_version": CHECKPOINT_VERSION}
            write_dcp(source, names, place, below="model", others=others, progress=progress)
        else:
            _write_ranks(source, names, stages, folder / RELEASE, progress)
        (folder / LATEST).write_text(RELEASE, encoding="utf-8")
        copy_model_files(model, folder)

    def _stages(self, names: Mapping[str, str], where: str) -> list[range]:
        blocks = 1 + max((b for name in names if (b := block_of(name)) is not None), default=-1)
        uneven = self.options.layers_per_stage
        if uneven is None:
            return [range(blocks)]
        if self.options.storage == "dcp":
            raise ModelError(f"{where}: layers_per_stage divides files of storage torch; with dcp leave it out")
        if sum(uneven) != blocks:
            raise ModelError(f"{where}: layers_per_stage = {uneven} must add up to the transformer's {blocks} blocks")
        return stage_layers(blocks, len(uneven), uneven)


def _write_ranks(
    source: WeightSource,
    names: Mapping[str, str],
    stages: Sequence[range],
    folder: Path,
    progress: Callable[[int, int], None],
) -> None:
    """One file a stage, its blocks counted from 0; one stage's tensors are mapped or held at a time."""
    total = sum(tensor_bytes(source, name) for name in names.values())
    done = 0
    for stage, blocks in enumerate(stages):
        model: dict[str, Tensor] = {}
        for stored, name in names.items():
            block = block_of(stored)
            if (_stage_outside(stored, len(stages)) != stage) if block is None else (block not in blocks):
                continue
            tensor = source.read(name)
            own = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
            local = stored if block is None else in_block(stored, block - blocks.start)
            model[local] = tensor if own else tensor.clone(memory_format=torch.contiguous_format)
            done += tensor.nbytes
            progress(done, total)
        content = {"model": model, "checkpoint_version": CHECKPOINT_VERSION}
        save_rank_file(content, folder / rank_folder(0, stage, len(stages)))


def _stage_outside(stored: str, stages: int) -> int:
    return stages - 1 if stored.startswith("head.") else 0


class _Renamed(WeightSource):
    """Some tensors of another source under other names."""

    def __init__(self, source: WeightSource, names: Mapping[str, str]) -> None:
        self.source, self._names = source, names
        self.where, self.model_folder = source.where, source.model_folder

    def names(self) -> Sequence[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(self._names[name])

    def dtype(self, name: str) -> torch.dtype:
        return self.source.dtype(self._names[name])

    def read(self, name: str) -> Tensor:
        return self.source.read(self._names[name])


def _renamed(source: WeightSource) -> WeightSource:
    prefix = prefix_of(source.names())
    if prefix is None:
        raise ModelError(f"{source.where} holds no Wan transformer, or several")
    stored = [name.removeprefix(prefix) for name in source.names() if name.startswith(prefix)]
    return _Renamed(source, {to_diffusers(name, source.where): prefix + name for name in stored})


class _RankSource(WeightSource):
    """The tensors of every pipeline stage under diffusers' names."""

    def __init__(self, ranks: RankFiles, *, where: str, model: Path | None) -> None:
        self.where, self.model_folder = where, model
        if ranks.tensor_parallel > 1:
            raise ModelError(f"{where}: a Wan transformer of {ranks.tensor_parallel} tensor-parallel ranks")
        self._stored: dict[str, StoredTensor] = {}
        start = 0
        for stage in range(ranks.pipeline_parallel):
            blocks = []
            for name, tensor in ranks.models[stage, 0].items():
                block = block_of(name)
                blocks += [block] if block is not None else []
                whole = name if block is None else in_block(name, start + block)
                self._stored[to_diffusers(whole, where)] = tensor
            start += 1 + max(blocks, default=-1)

    def names(self) -> Sequence[str]:
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._stored[name].dtype

    def read(self, name: str) -> Tensor:
        return self._stored[name].read()
