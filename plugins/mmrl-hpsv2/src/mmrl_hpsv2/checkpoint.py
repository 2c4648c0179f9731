"""Reads a checkpoint file into names and tensors, without running any code from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmrl_core.errors import RewardError

DOWNLOAD = "Cure: download HPS_v2.1_compressed.pt from the Hugging Face repository xswu/HPSv2 and give its path"
_ZIP = b"PK\x03\x04"


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.pt` file (`{"state_dict": ...}`, or the names themselves) or a `.safetensors` file, by name.

    They may be mapped from the file: copy what is kept. Raises RewardError.
    """
    if not path.exists():
        raise RewardError(f"checkpoint {path} does not exist. {DOWNLOAD}")
    if not path.is_file():
        raise RewardError(f"checkpoint {path} is not a file. {DOWNLOAD}")
    with path.open("rb") as file:
        head = file.read(256)
    _refuse_stand_ins(path, head)
    try:
        if path.suffix == ".safetensors":
            loaded: Any = load_file(path)
        else:
            # Only the zip format, torch's own since 1.6, can be mapped.
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=head.startswith(_ZIP))
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise RewardError(
            f"checkpoint {path} ({path.stat().st_size} bytes) cannot be read: it is damaged, incomplete, or holds more "
            f"than tensors ({type(error).__name__}: {reason}). {DOWNLOAD}"
        ) from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    return _only_tensors(path, loaded)


def _refuse_stand_ins(path: Path, head: bytes) -> None:
    """What downloads leave behind when they bring something else than the file."""
    if not head:
        raise RewardError(f"checkpoint {path} is empty. {DOWNLOAD}")
    if head.lstrip().startswith(b"<"):
        raise RewardError(f"checkpoint {path} is a web page (HTML), not the file that was meant. {DOWNLOAD}")
    if head.startswith(b"version https://git-lfs"):
        raise RewardError(f"checkpoint {path} is a Git LFS pointer, not the file itself. Cure: git lfs pull")


def _only_tensors(path: Path, loaded: Any) -> dict[str, Tensor]:
    if not isinstance(loaded, Mapping):
        raise RewardError(f"checkpoint {path} holds a {type(loaded).__name__}, not tensors by name. {DOWNLOAD}")
    for name, tensor in loaded.items():
        if not isinstance(tensor, Tensor):
            names = ", ".join(repr(n) for n in list(loaded)[:6])
            raise RewardError(
                f"checkpoint {path} has neither a `state_dict` nor tensors by name: {name!r} is a "
                f"{type(tensor).__name__} (it begins with {names}). {DOWNLOAD}"
            )
        if not tensor.is_floating_point():
            raise RewardError(f"checkpoint {path}: {name!r} is of {tensor.dtype}, not floating point. {DOWNLOAD}")
    return dict(loaded)
