"""Reading files of torch.save without loading them: tensors stay in the file, and nothing of a stranger's is run.

Such a file is a zip archive of a pickle and the tensors' memory. torch's own safe reader refuses the pickle protocol
that MindSpeed-LLM writes (4), so the pickle is read here with an unpickler that makes plain containers, namespaces and
dtypes, and an inert `Opaque` of any other class or function (an enum of Megatron's, an optimizer's NumPy array).
"""

from __future__ import annotations

import argparse
import pickle
import struct
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrl_core.errors import ModelError

_LOCAL_HEADER = 30
"""Bytes of a zip member's local header before its name."""

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor that is still in its file."""

    file: Path
    start: int
    """Byte of the file at which its first element stands."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def read(self) -> Tensor:
        """The tensor, mapped from the file: pages are read when they are used, and writing does not reach the file."""
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.dtype)
        size = self.start + _extent(self.shape, self.stride) * self.dtype.itemsize
        whole = torch.UntypedStorage.from_file(str(self.file), shared=False, nbytes=size)
        tensor = torch.empty(0, dtype=self.dtype)
        return tensor.set_(whole[self.start :], 0, self.shape, self.stride)


class Opaque:
    """Stands for an object of any class that is none of a checkpoint's plain values."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """Take an item of what may have been a list."""

    def extend(self, items: Any) -> None:
        """Take items of what may have been a list."""

    def __hash__(self) -> int:
        return id(self)


def read_torch_file(file: Path, where: str) -> Any:
    """What torch.save wrote, with a StoredTensor in place of each tensor.

    Args:
        where: what named the checkpoint, for errors.

    Raises:
        ModelError: the file is missing, cut short, or no file of torch.save.
    """
    try:
        with zipfile.ZipFile(file) as archive, file.open("rb") as raw:
            return _read(file, archive, raw)
    except zipfile.BadZipFile as error:
        raise ModelError(f"{where}: {file} is cut short, or no file of torch.save: {error}") from error
    except _READING as error:
        raise ModelError(f"{where}: {file} cannot be read: {type(error).__name__}: {error}") from error


_READING = (
    OSError,
    pickle.UnpicklingError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    EOFError,
    ImportError,
    struct.error,
)


def _read(file: Path, archive: zipfile.ZipFile, raw: Any) -> Any:
    description = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
    if description is None:
        raise ValueError("it holds no data.pkl")
    root = description.removesuffix("data.pkl")
    if root + "byteorder" in archive.namelist() and archive.read(root + "byteorder") != b"little":
        raise ValueError("its numbers are big-endian")

    def place(key: str) -> tuple[int, int]:
        """(first byte, number of bytes) of a storage's memory in the file."""
        member = archive.getinfo(f"{root}data/{key}")
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"the storage {key} is compressed")
        raw.seek(member.header_offset)
        header = raw.read(_LOCAL_HEADER)
        name, extra = struct.unpack("<HH", header[26:30])
        return member.header_offset + _LOCAL_HEADER + name + extra, member.file_size

    with archive.open(description) as pickled:
        return _Unpickler(pickled, file, place).load()


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype | None
    start: int
    size: int


class _Unpickler(pickle.Unpickler):
    def __init__(self, pickled: Any, file: Path, place: Callable[[str], tuple[int, int]]) -> None:
        super().__init__(pickled)
        self._file, self._place = file, place

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch":
            if name in _STORAGE_DTYPES:
                return _STORAGE_DTYPES[name]
            if isinstance(getattr(torch, name, None), torch.dtype):
                return getattr(torch, name)
        ours: dict[tuple[str, str], Any] = {
            ("argparse", "Namespace"): argparse.Namespace,
            ("types", "SimpleNamespace"): argparse.Namespace,
            ("collections", "OrderedDict"): _plain_dict,
            ("collections", "defaultdict"): _plain_dict,
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v3"): self._typed_tensor,
            ("torch._utils", "_rebuild_parameter"): _parameter,
        }
        return ours.get((module, name)) or type(name.rpartition(".")[2], (Opaque,), {"__module__": module})

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, _ = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"unknown persistent object {kind!r}")
        start, size = self._place(str(key))
        return _Storage(dtype if isinstance(dtype, torch.dtype) else None, start, size)

    def _tensor(self, storage: _Storage, offset: int, shape: Sequence[int], stride: Sequence[int], *_: Any) -> Any:
        if storage.dtype is None:
            raise pickle.UnpicklingError("a tensor of an unknown dtype")
        return self._stored(storage, storage.dtype, offset, shape, stride)

    def _typed_tensor(
        self,
        storage: _Storage,
        offset: int,
        shape: Sequence[int],
        stride: Sequence[int],
        grad: bool,
        hooks: Any,
        dtype: torch.dtype,
        *_: Any,
    ) -> Any:
        return self._stored(storage, dtype, offset, shape, stride)

    def _stored(
        self, storage: _Storage, dtype: torch.dtype, offset: int, shape: Sequence[int], stride: Sequence[int]
    ) -> StoredTensor:
        if min(*shape, *stride, offset, 0) < 0:
            raise pickle.UnpicklingError(f"a tensor with the shape {tuple(shape)} and strides {tuple(stride)}")
        needed = (offset + _extent(shape, stride)) * dtype.itemsize if 0 not in shape else 0
        if needed > storage.size:
            raise pickle.UnpicklingError(f"a tensor needs {needed} bytes of a storage that has {storage.size}")
        return StoredTensor(
            file=self._file,
            start=storage.start + offset * dtype.itemsize,
            dtype=dtype,
            shape=tuple(shape),
            stride=tuple(stride),
        )


def _extent(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to the last one, inclusive."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _plain_dict(*arguments: Any) -> dict[Any, Any]:
    """A dict in place of its subclasses; a default factory is left out."""
    pairs = next((a for a in arguments if isinstance(a, dict | list | tuple)), ())
    return dict(pairs)


def _parameter(data: Any, *_: Any) -> Any:
    return data
