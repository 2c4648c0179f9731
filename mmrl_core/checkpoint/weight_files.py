"""Writing a stream of weights as safetensors files with the Hugging Face names and index."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from mmrl_core.contracts import Bucket

SHARD_BYTES = 4 << 30


@contextmanager
def replaced_folder(directory: Path) -> Iterator[Path]:
    """A folder beside `directory` to write into, which takes its place when the block ends well."""
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if directory.exists():
        shutil.rmtree(directory)
    partial.rename(directory)


def write_weights(folder: Path, weights: Iterable[Bucket], dtype: torch.dtype, *, stem: str) -> None:
    """Write `stem.safetensors`, or numbered shards and `stem.safetensors.index.json` for more than SHARD_BYTES.

    The stream is exhausted; at most one shard is held in memory.
    """
    from safetensors.torch import save_file

    files: list[Path] = []
    keys: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        file = folder / f"{stem}-{len(files) + 1:05d}.safetensors"
        save_file(shard, file, metadata={"format": "pt"})
        files.append(file)
        keys.append(list(shard))

    for bucket in weights:
        for name, tensor in bucket:
            bytes_ = tensor.numel() * dtype.itemsize
            if shard and size + bytes_ > SHARD_BYTES:
                flush()
                shard, size = {}, 0
            shard[name] = tensor.detach().to("cpu", dtype).contiguous()
            size += bytes_
            total += bytes_
    flush()
    _name_shards(folder, files, keys, total, stem)


def _name_shards(folder: Path, files: list[Path], keys: list[list[str]], total: int, stem: str) -> None:
    if len(files) == 1:
        files[0].rename(folder / f"{stem}.safetensors")
        return
    index: dict[str, str] = {}
    for number, (file, names) in enumerate(zip(files, keys, strict=True), start=1):
        final = f"{stem}-{number:05d}-of-{len(files):05d}.safetensors"
        file.rename(folder / final)
        index.update(dict.fromkeys(names, final))
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
    (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")
