"""The folders in which Megatron keeps one file a rank: `release/mp_rank_00_001/model_optim_rng.pt`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmrl_core.errors import ModelError
from mmrl_mindspeed.torch_files import StoredTensor, read_torch_file

LATEST = "latest_checkpointed_iteration.txt"
RELEASE = "release"
FILE = "model_optim_rng.pt"

_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")


@dataclass(frozen=True, kw_only=True)
class RankFiles:
    """What the ranks of one iteration hold, tensors still in their files."""

    tensor_parallel: int
    pipeline_parallel: int
    models: Mapping[tuple[int, int], Mapping[str, StoredTensor]]
    """By (pipeline stage, tensor-parallel rank): the tensors of `model`, by name, as stored."""
    args: argparse.Namespace | None
    """Megatron's arguments of the run that wrote them, or None."""


def rank_folder(tensor_rank: int, stage: int, pipeline_parallel: int) -> str:
    """`mp_rank_00`, or `mp_rank_00_000` when there are several pipeline stages."""
    return f"mp_rank_{tensor_rank:02d}" + (f"_{stage:03d}" if pipeline_parallel > 1 else "")


def iteration_name(iteration: int | None) -> str:
    """`release`, which starts a run at its first iteration, or `iter_0000100`."""
    return RELEASE if iteration is None else f"iter_{iteration:07d}"


def iteration_folder(folder: Path) -> Path | None:
    """The folder with the rank folders: the one that `latest_checkpointed_iteration.txt` names, or `folder` itself."""
    latest = folder / LATEST
    if latest.is_file():
        word = latest.read_text(encoding="utf-8", errors="replace").strip()
        if word == RELEASE:
            return folder / RELEASE
        return folder / iteration_name(int(word)) if word.isdigit() else None
    return folder if any(folder.glob("mp_rank_*")) else None


def first_file(folder: Path) -> Path | None:
    """A file of a rank below the folder's newest iteration, for a look at its names."""
    place = iteration_folder(folder)
    return next(iter(sorted(place.glob(f"mp_rank_*/{FILE}"))), None) if place else None


def save_rank_file(content: Mapping[str, Any], folder: Path) -> None:
    """Write one rank's file into its folder, which is made. Raises OSError, also where torch raises its own error."""
    folder.mkdir(parents=True)
    try:
        torch.save(dict(content), folder / FILE)
    except RuntimeError as error:
        raise OSError(f"{folder / FILE}: {error}") from error


def read_rank_files(folder: Path, where: str) -> RankFiles:
    """Open the file of every rank of the newest iteration.

    Raises ModelError when one is missing or damaged, ranks are missing, or the layout is one that is not supported.
    """
    place = iteration_folder(folder)
    if place is None or not place.is_dir():
        raise ModelError(f"{where} is no checkpoint of Megatron: {_why_not(folder, place)}")
    files: dict[tuple[int, int], Path] = {}
    for child in sorted(place.glob("mp_rank_*")):
        found = _RANK.fullmatch(child.name)
        if found is None or found[3] is not None:
            raise ModelError(f"{where}: {child.name} is of an expert-parallel layout, which is not supported")
        files[int(found[2] or 0), int(found[1])] = child / FILE
    if not files:
        distributed = (
            " It is a distributed checkpoint: save it with --ckpt-format torch, or, when its names are those of "
            f"Hugging Face, name {place} as the format dcp"
        )
        raise ModelError(
            f"{where}: {place.name} has no mp_rank_* folders.{distributed if (place / '.metadata').is_file() else ''}"
        )
    contents = {rank: read_torch_file(file, where) for rank, file in sorted(files.items())}
    args = next((c["args"] for c in contents.values() if isinstance(c, dict) and _is_args(c.get("args"))), None)
    stages = 1 + max(stage for stage, _ in files)
    ranks = 1 + max(rank for _, rank in files)
    stages = max(stages, _stated(args, "pipeline_model_parallel_size"))
    ranks = max(ranks, _stated(args, "tensor_model_parallel_size"))
    missing = [
        rank_folder(rank, stage, stages)
        for stage in range(stages)
        for rank in range(ranks)
        if (stage, rank) not in files
    ]
    if missing:
        raise ModelError(
            f"{where}: the checkpoint is of {ranks} tensor-parallel x {stages} pipeline ranks, but {place.name} lacks "
            f"{', '.join(missing)}"
        )
    return RankFiles(
        tensor_parallel=ranks,
        pipeline_parallel=stages,
        models={rank: _model(content, f"{where}: {files[rank]}") for rank, content in contents.items()},
        args=args,
    )


def _model(content: Any, where: str) -> Mapping[str, StoredTensor]:
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        virtual = isinstance(content, dict) and "model0" in content
        what = "it is of a virtual pipeline, which is not supported" if virtual else "it has no entry `model`"
        raise ModelError(f"{where}: {what}")
    if "language_model" in content["model"]:
        raise ModelError(f"{where} is of Megatron before megatron-core; convert it with --use-mcore-models first")
    return {name: value for name, value in content["model"].items() if isinstance(value, StoredTensor)}


def _is_args(value: Any) -> bool:
    return isinstance(value, argparse.Namespace)


def _stated(args: argparse.Namespace | None, name: str) -> int:
    value = getattr(args, name, None)
    return value if isinstance(value, int) else 1


def _why_not(folder: Path, place: Path | None) -> str:
    if place is not None:
        return f"{LATEST} names {place.name}, which is not there"
    return f"{LATEST} holds no iteration" if (folder / LATEST).is_file() else f"it has no {LATEST}"
