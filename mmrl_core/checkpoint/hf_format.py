"""Weights as transformers and diffusers store them: safetensors files beside a config."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmrl_core.checkpoint.format_options import HuggingFaceOptions
from mmrl_core.checkpoint.model_files import copy_model_files, is_diffusers, read_config
from mmrl_core.checkpoint.safetensors_stream import DTYPES, file_plan, write_safetensors
from mmrl_core.contracts import WeightFormat, WeightSource
from mmrl_core.errors import ModelError

STEMS = ("model", "diffusion_pytorch_model")
"""What the files are called by transformers and by diffusers."""

NETWORK = "transformer"
"""The subfolder of a diffusers pipeline that holds the network that is trained."""


class HuggingFaceFormat(WeightFormat):
    """`config.json` with `model*.safetensors` or `diffusion_pytorch_model*.safetensors`, and their index."""

    options: HuggingFaceOptions

    @classmethod
    def detect(cls, folder: Path) -> bool:
        place = network_folder(folder)
        return (place / "config.json").is_file() and any(any(place.glob(f"{stem}*.safetensors*")) for stem in STEMS)

    @classmethod
    def open(cls, folder: Path, *, where: str, model: Path | None) -> WeightSource:
        if (folder / "transformer_2").is_dir() and network_folder(folder) != folder:
            raise ModelError(
                f"{where} is a pipeline with two networks; name one of them: {folder / NETWORK} or "
                f"{folder / 'transformer_2'}"
            )
        return HuggingFaceSource(network_folder(folder), where=where, complete=model is None)

    def write(
        self, source: WeightSource, folder: Path, *, model: Path | None, progress: Callable[[int, int], None]
    ) -> None:
        if model is None:
            raise ModelError(
                f"{source.where}: a Hugging Face folder needs the model's config, and none came with these weights. "
                "Name the original model's folder with --model"
            )
        config = read_config(model)
        stem, limit = STEMS[is_diffusers(config)], int(self.options.shard_gb * 2**30)
        file_plan(source, stem, limit)
        copy_model_files(model, folder, into=".")
        _state_dtype(source, folder, config)
        write_safetensors(source, folder, stem=stem, limit=limit, progress=progress)


def network_folder(folder: Path) -> Path:
    """`folder`, or the network's folder in it when it is a pipeline of diffusers."""
    return folder / NETWORK if (folder / "model_index.json").is_file() else folder


def _state_dtype(source: WeightSource, folder: Path, config: dict[str, Any]) -> None:
    """Let the config name the dtype that the weights have, where it names one."""
    dtypes = {source.dtype(name) for name in source.names()}
    fields = [field for field in ("dtype", "torch_dtype") if field in config]
    if len(dtypes) == 1 and fields:
        word = str(dtypes.pop()).removeprefix("torch.")
        if any(config[field] != word for field in fields):
            text = json.dumps({**config, **dict.fromkeys(fields, word)}, indent=2, ensure_ascii=False)
            (folder / "config.json").write_text(text + "\n", encoding="utf-8")


class HuggingFaceSource(WeightSource):
    """The tensors of a folder, mapped from its files."""

    def __init__(self, folder: Path, *, where: str, complete: bool) -> None:
        """Open every file. Raises ModelError when one is missing, cut short, or lacks what the index says it has."""
        self.where, self.model_folder, self.complete = where, folder, complete
        self._file_of = self._files(folder)
        self._open: dict[str, Any] = {}
        self._described: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for file in dict.fromkeys(self._file_of.values()):
            self._open[file] = self._opened(folder / file)
        for name, file in self._file_of.items():
            self._described[name] = self._description(name, file)

    def names(self) -> Sequence[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._described[name][0]

    def dtype(self, name: str) -> torch.dtype:
        return self._described[name][1]

    def read(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._open[self._file_of[name]].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self.where}: {self._file_of[name]}: {name} cannot be read: {error}") from error
        return tensor

    def _files(self, folder: Path) -> dict[str, str]:
        """File by tensor, in the order of the files."""
        for stem in STEMS:
            index = folder / f"{stem}.safetensors.index.json"
            single = folder / f"{stem}.safetensors"
            if index.is_file():
                return self._indexed(folder, index)
            if single.is_file():
                return dict.fromkeys(self._opened(single).keys(), single.name)
        some = next(iter(sorted(folder.glob("*.safetensors"))), None)
        what = f"{some.name} has no index beside it" if some else "it has no *.safetensors files"
        raise ModelError(f"{self.where} is no folder of Hugging Face weights: {what}")

    def _indexed(self, folder: Path, index: Path) -> dict[str, str]:
        try:
            found: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            missing = sorted({file for file in found.values() if not (folder / file).is_file()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{self.where}: {index.name} cannot be read: {type(error).__name__}: {error}") from error
        if missing:
            raise ModelError(f"{self.where}: {index.name} names files that are not there: {', '.join(missing)}")
        return dict(sorted(found.items(), key=lambda item: item[1]))

    def _opened(self, file: Path) -> Any:
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self.where}: {file.name} is damaged or incomplete: {error}") from error

    def _description(self, name: str, file: str) -> tuple[tuple[int, ...], torch.dtype]:
        try:
            found = self._open[file].get_slice(name)
        except SafetensorError as error:
            raise ModelError(f"{self.where}: {file} does not hold {name}, which the index says it has") from error
        word = str(found.get_dtype())
        if word not in DTYPES:
            raise ModelError(f"{self.where}: {name} has the dtype {word}, which is not supported here")
        return tuple(found.get_shape()), DTYPES[word]
