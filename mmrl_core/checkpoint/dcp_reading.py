"""Reading what torch.distributed.checkpoint wrote, mmrl's or anybody's, without trusting it."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from mmrl_core.contracts import WeightSource
from mmrl_core.errors import ModelError

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


def dcp_folder(folder: Path) -> Path | None:
    """`folder`, or its `backend` folder (mmrl's checkpoints), whichever torch.distributed.checkpoint wrote; or None."""
    return next((place for place in (folder, folder / "backend") if (place / ".metadata").is_file()), None)


class DcpSource(WeightSource):
    """Every tensor of such a folder, in this process alone, without collectives. Names are as stored."""

    def __init__(self, folder: Path, *, where: str, model: Path | None) -> None:
        """Read the description and check that the data files are as long as it says.

        Args:
            folder: holds .metadata.

        Raises:
            ModelError: it cannot be read.
        """
        self.where, self.model_folder = where, model
        self._reader = _Reader(folder)
        with self._reading():
            metadata = self._reader.read_metadata()
            self._reader.metadata = metadata
            self._tensors = {
                name: stored
                for name, stored in metadata.state_dict_metadata.items()
                if isinstance(stored, TensorStorageMetadata)
            }
            _check_files(folder, metadata)

    def names(self) -> Sequence[str]:
        """As stored: prefixes and the optimizer's tensors included."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].size)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].properties.dtype

    def read(self, name: str) -> Tensor:
        tensor = torch.empty(self.shape(name), dtype=self.dtype(name))
        with self._reading(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load({name: tensor}, storage_reader=self._reader, no_dist=True)
        return tensor

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """What reading raises, as a ModelError that names the folder."""
        try:
            yield
        except CheckpointException as error:
            cause = first_failure(error)
            if not isinstance(cause, Exception):  # Ctrl-C, which PyTorch wraps like anything else
                raise cause from error
            raise self._unreadable(cause) from error
        except (*_READING, AssertionError, pickle.UnpicklingError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: BaseException) -> ModelError:
        return ModelError(f"{self.where}: the checkpoint cannot be read: {type(error).__name__}: {error}")


def first_failure(error: CheckpointException) -> BaseException:
    """What was really raised: PyTorch wraps every exception of a rank, KeyboardInterrupt included."""
    return next((failure[0] for failure in error.failures.values()), error)


_READING = (OSError, RuntimeError, ValueError, KeyError, EOFError, AttributeError, TypeError)


class _Reader(FileSystemReader):
    """Reads a stranger's checkpoint: its description is a pickle, of which only the expected classes are loaded."""

    metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self.metadata is not None:
            return self.metadata
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
        if (module, name) == ("builtins", "getattr"):
            return _member
        raise pickle.UnpicklingError(f".metadata names {module}.{name}, which describes no tensor; it was not loaded")


def _member(kind: Any, name: str) -> Any:
    """What early releases of Python 3.11 write for the member of an enumeration, and nothing else."""
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise pickle.UnpicklingError(f".metadata takes {name!r} from {kind!r}, no enumeration; it was not loaded")
    return kind[name]


def _check_files(folder: Path, metadata: Metadata) -> None:
    """Every data file must reach as far as the description says. Raises OSError."""
    ends: dict[str, int] = {}
    for stored in (metadata.storage_data or {}).values():
        ends[stored.relative_path] = max(ends.get(stored.relative_path, 0), stored.offset + stored.length)
    for name, end in ends.items():
        size = (folder / name).stat().st_size
        if size < end:
            raise OSError(f"{name} has {size:,} bytes of at least {end:,}: it was cut short")
