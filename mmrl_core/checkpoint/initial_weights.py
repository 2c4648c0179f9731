"""Weights to start from, out of a folder that torch.distributed.checkpoint wrote (mmrl's or anybody's)."""

from __future__ import annotations

import logging
import pickle
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from mmrl_core.errors import ModelError

log = logging.getLogger("mmrl.model")

KNOWN_PREFIXES = ("", "model.", "module.", "state_dict.", "state.model.", "model.model.", "model.network.")
"""What usually stands before the names; others are found too, unless several would do. The last two are mmrl's."""

SHOWN = 5
"""Names of one kind in an error."""

_METADATA_CLASSES = {
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "collections": {"OrderedDict"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}
"""All that the description of a checkpoint is made of, beside torch's dtypes."""


def load_initial(module: nn.Module, folder: str, name_of: Callable[[str], str]) -> None:
    """Replace the module's parameters (and those of its buffers that the checkpoint holds) by those of `folder`.

    Runs on this process alone, without collectives. Tensors are found by their Hugging Face name behind one common
    prefix and converted to the module's dtypes. What belongs to an optimizer, or stands behind another prefix, is left
    alone. A tied weight may be stored under any of its names, or under several with one value. mmrl's own checkpoints
    are found by their `step_...` folder or its `backend` folder.

    Args:
        module: on the CPU, not sharded, without adapters.
        folder: written by torch.distributed.checkpoint, on any number of ranks.
        name_of: the Hugging Face name of a parameter or buffer of `module`.

    Raises:
        ModelError: the folder is no such checkpoint, or does not hold every parameter exactly once with its shape and
            nothing else.
    """
    reader = _Reader(_find(folder))
    with _reading(folder):
        metadata = reader.read_metadata()
    shapes = {
        name: tuple(stored.size)
        for name, stored in metadata.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }
    targets = _targets(module, name_of)
    prefix = _prefix(folder, targets, shapes)
    found = [[prefix + name for name in target.names if prefix + name in shapes] for target in targets]
    _check(folder, prefix, targets, found, shapes)
    wanted: dict[str, Tensor] = {}
    twins: list[tuple[str, str]] = []
    for target, names in zip(targets, found, strict=True):
        for name in names:
            wanted[name] = target.tensor.detach() if name == names[0] else torch.empty_like(target.tensor)
        twins += [(names[0], other) for other in names[1:]]
    with _reading(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(dict(wanted), storage_reader=reader, no_dist=True)
    for name, other in twins:
        if not torch.equal(wanted[name], wanted[other]):
            raise ModelError(
                f"model.init_from {folder!r}: {name} and {other} differ, but they are one tied weight in the model"
            )
    log.info("%d tensors from %s", len(wanted) - len(twins), folder)


# -------------------------------------------------------------------------------------------- the folder


def _find(folder: str) -> Path:
    path = Path(folder)
    for place in (path, path / "backend"):
        if (place / ".metadata").is_file():
            return place
    what = "it has no file .metadata" if path.is_dir() else "no such folder"
    raise ModelError(
        f"model.init_from {folder!r} is no folder of torch.distributed.checkpoint: {what}. Give the folder that holds "
        ".metadata and *.distcp files; of a run of mmrl, runs/NAME/checkpoints/step_NNNNNNNN"
    )


class _Reader(FileSystemReader):
    """Reads a stranger's checkpoint: its description is a pickle, of which only the expected classes are loaded."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f".metadata holds an object of type {type(metadata).__name__}")
        stored = getattr(metadata, "storage_meta", None)  # older checkpoints have none
        metadata.storage_meta = StorageMeta() if stored is None else stored
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f".metadata names {module}.{name}, which describes no tensor; it was not loaded")


_READING = (CheckpointException, OSError, RuntimeError, ValueError, KeyError, EOFError, AttributeError, TypeError)


@contextmanager
def _reading(folder: str) -> Iterator[None]:
    """What reading raises, as a ModelError that names the folder."""
    try:
        yield
    except (*_READING, AssertionError, pickle.UnpicklingError) as error:
        raise ModelError(
            f"model.init_from {folder!r}: the checkpoint cannot be read: {type(error).__name__}: {error}"
        ) from error


# -------------------------------------------------------------------------------------------------- names


@dataclass(frozen=True, kw_only=True)
class _Target:
    """One tensor of the module."""

    names: tuple[str, ...]
    """Hugging Face names; several for a tied weight."""
    tensor: Tensor
    required: bool


def _targets(module: nn.Module, name_of: Callable[[str], str]) -> list[_Target]:
    parameters = _by_tensor(module.named_parameters(remove_duplicate=False), name_of)
    buffers = _by_tensor(module.named_buffers(remove_duplicate=False), name_of)
    targets = [_Target(names=tuple(n), tensor=t, required=True) for n, t in parameters]
    targets += [_Target(names=tuple(n), tensor=t, required=False) for n, t in buffers]
    names = Counter(name for target in targets for name in target.names)
    assert not names or max(names.values()) == 1, f"two tensors of one name: {names.most_common(1)}"
    return targets


def _by_tensor(named: Iterable[tuple[str, Tensor]], name_of: Callable[[str], str]) -> list[tuple[list[str], Tensor]]:
    found: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in named:
        found.setdefault(id(tensor), ([], tensor))[0].append(name_of(name))
    return list(found.values())


def _prefix(folder: str, targets: Sequence[_Target], shapes: Mapping[str, Any]) -> str:
    """The prefix behind which most parameters are found; of several equally good ones a known one."""
    owner = {name: i for i, target in enumerate(targets) if target.required for name in target.names}
    behind: dict[str, set[int]] = {}
    for key in shapes:
        start = 0
        while start >= 0:
            if key[start:] in owner:
                behind.setdefault(key[:start], set()).add(owner[key[start:]])
            start = key.find(".", start) + 1 or -1
    most = max((len(found) for found in behind.values()), default=0)
    best = [prefix for prefix, found in behind.items() if len(found) == most]
    known = [prefix for prefix in KNOWN_PREFIXES if prefix in best]
    if known or not best:
        return known[0] if known else ""
    if len(best) > 1 and most == len(set(owner.values())):
        raise ModelError(
            f"model.init_from {folder!r} holds the model's weights more than once, behind "
            f"{', '.join(map(repr, best))}; store the ones to start from by themselves"
        )
    return min(best, key=len)


def _check(
    folder: str,
    prefix: str,
    targets: Sequence[_Target],
    found: Sequence[Sequence[str]],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    missing = [t.names[0] for t, names in zip(targets, found, strict=True) if t.required and not names]
    ours = {name for target in targets for name in target.names}
    others = ("optimizer.", "optim.") if not prefix else ()
    unexpected = [
        key
        for key in shapes
        if key.startswith(prefix) and key[len(prefix) :] not in ours and not key.startswith(others)
    ]
    wrong = [
        f"{name}: {shapes[name]} in the checkpoint, {tuple(target.tensor.shape)} in the model"
        for target, names in zip(targets, found, strict=True)
        for name in names
        if shapes[name] != tuple(target.tensor.shape)
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": wrong}
    lines = [
        f"  {kind} ({len(names)}): {'; '.join(names[:SHOWN])}{'; ...' if len(names) > SHOWN else ''}"
        for kind, names in kinds.items()
        if names
    ]
    if lines:
        at = f" behind the prefix {prefix!r}" if prefix else ""
        raise ModelError(
            f"model.init_from {folder!r} does not hold the weights of this model{at}:\n" + "\n".join(lines)
        )
