"""HPSv3's published checkpoint: which tensors a file holds, read one at a time."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmrl_core.errors import RewardError

CURE = (
    "Cure: `hf download MizzenAI/HPSv3 HPSv3.safetensors --local-dir FOLDER` and name FOLDER/HPSv3.safetensors as "
    "`checkpoint`"
)
EMBEDDING = "model.embed_tokens.weight"
"""The published name of the token table."""
_PICKLED = (".pt", ".pth", ".bin")


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor of the file."""

    shape: tuple[int, ...]
    """Its shape, known without reading it."""
    read: Callable[[], Tensor]
    """Reads it, on the CPU, in the file's dtype."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a file holds."""

    path: Path
    """The file."""
    tensors: Mapping[str, Stored]
    """By published name: `visual.*`, `model.*` (the language model), `rm_head.*`."""


def open_checkpoint(path: Path) -> Checkpoint:
    """List the tensors of a checkpoint without reading them.

    Published names are accepted as they are, behind one more `model.` or below an entry `model`, and as transformers 5
    spells them; `lm_head.weight`, which no score depends on, is left out.

    Raises RewardError for a file that is missing, damaged, no checkpoint, or not HPSv3's.
    """
    if path.is_dir():
        raise RewardError(f"checkpoint {str(path)!r} is a folder; name the file in it. {CURE}")
    if not path.is_file():
        raise RewardError(f"checkpoint {str(path)!r}: there is no such file. {CURE}")
    _check_beginning(path)
    if path.suffix == ".safetensors":
        tensors = _safetensors(path)
    elif path.suffix in _PICKLED:
        tensors = _pickled(path)
    else:
        raise RewardError(
            f"checkpoint {path}: unknown suffix {path.suffix!r}; known: .safetensors, {', '.join(_PICKLED)}. {CURE}"
        )
    return Checkpoint(path=path, tensors=_published_names(path, tensors))


def _check_beginning(path: Path) -> None:
    try:
        with path.open("rb") as file:
            beginning = file.read(256).lstrip().lower()
    except OSError as error:
        raise RewardError(f"checkpoint {path} cannot be read: {error}") from error
    if beginning.startswith((b"<!doctype", b"<html")):
        raise RewardError(f"checkpoint {path} is a web page, not weights. {CURE}")
    if beginning.startswith(b"version https://git-lfs"):
        raise RewardError(f"checkpoint {path} is a Git LFS pointer, not the weights it points to. {CURE}")


def _safetensors(path: Path) -> dict[str, Stored]:
    try:
        file: Any = safe_open(path, framework="pt", device="cpu")
        return {
            name: Stored(shape=tuple(file.get_slice(name).get_shape()), read=_reader(file, name))
            for name in file.keys()  # noqa: SIM118 - not a mapping
        }
    except (SafetensorError, OSError) as error:
        raise RewardError(
            f"checkpoint {path} ({path.stat().st_size} bytes) is damaged or not complete: {error}. {CURE}"
        ) from error


def _reader(file: Any, name: str) -> Callable[[], Tensor]:
    return lambda: file.get_tensor(name)


def _pickled(path: Path) -> dict[str, Stored]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise RewardError(
            f"checkpoint {path} ({path.stat().st_size} bytes) cannot be read as tensors only: {error}. {CURE}"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise RewardError(f"checkpoint {path} does not map names to tensors. {CURE}")
    return {str(name): Stored(shape=tuple(tensor.shape), read=_holder(tensor)) for name, tensor in content.items()}


def _holder(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


def _published_names(path: Path, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    if not any("rm_head." in name for name in tensors):
        first = ", ".join(sorted(tensors)[:3])
        raise RewardError(
            f"checkpoint {path} holds {len(tensors)} tensors ({first}, ...) but no reward head `rm_head.*`: these are "
            f"not HPSv3's weights. {CURE}"
        )
    below = "model." if all(name.startswith("model.") for name in tensors) else ""
    named = {_published(name.removeprefix(below)): stored for name, stored in tensors.items()}
    named.pop("lm_head.weight", None)
    return named


def _published(name: str) -> str:
    for spelled, published in (("model.visual.", "visual."), ("model.language_model.", "model.")):
        if name.startswith(spelled):
            return published + name.removeprefix(spelled)
    return name
