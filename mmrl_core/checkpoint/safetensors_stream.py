"""Writing safetensors files one tensor at a time: the header is known before the first tensor is read.

The format: 8 bytes with the header's length, a JSON header with dtype, shape and place of every tensor, the data.
https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmrl_core.checkpoint.matching import tensor_bytes
from mmrl_core.contracts import WeightSource
from mmrl_core.errors import ModelError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's words for dtypes."""

_WORDS = {dtype: word for word, dtype in DTYPES.items()}


def file_plan(source: WeightSource, stem: str, limit: int) -> list[tuple[str, list[str]]]:
    """(file name, names of its tensors) of each file: one, or numbered ones of at most `limit` bytes where tensors fit.

    Raises ModelError for a dtype that safetensors has no word for.
    """
    for name in source.names():
        if source.dtype(name) not in _WORDS:
            raise ModelError(f"{source.where}: {name} is {source.dtype(name)}, which safetensors files cannot hold")
    shards: list[list[str]] = [[]]
    size = 0
    for name in source.names():
        bytes_ = tensor_bytes(source, name)
        if shards[-1] and size + bytes_ > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += bytes_
    if len(shards) == 1:
        return [(f"{stem}.safetensors", shards[0])]
    return [(f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors", names) for i, names in enumerate(shards, start=1)]


def write_safetensors(
    source: WeightSource, folder: Path, *, stem: str, limit: int, progress: Callable[[int, int], None]
) -> None:
    """Write every tensor of `source` into `folder`, and an index when there are several files.

    Holds one tensor at a time. Raises ModelError, before anything is written, as `file_plan` does.
    """
    plan = file_plan(source, stem, limit)
    total = sum(tensor_bytes(source, name) for name in source.names())
    done = 0
    for file, names in plan:
        ordered = sorted(names, key=lambda name: -source.dtype(name).itemsize)  # each at a multiple of its own size
        with (folder / file).open("wb") as out:
            out.write(_header(source, ordered))
            for name in ordered:
                out.write(raw_bytes(source.read(name)))
                done += tensor_bytes(source, name)
                progress(done, total)
    if len(plan) > 1:
        weight_map = {name: file for file, names in plan for name in names}
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"
        (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's elements in order as they are stored: a view of its memory when it is contiguous."""
    assert sys.byteorder == "little", "safetensors holds little-endian numbers"
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _header(source: WeightSource, names: Sequence[str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        end = start + tensor_bytes(source, name)
        entries[name] = {
            "dtype": _WORDS[source.dtype(name)],
            "shape": list(source.shape(name)),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
