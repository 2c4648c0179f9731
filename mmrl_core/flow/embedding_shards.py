"""Writing a folder of embeddings, shard by shard, by any number of processes that may be killed at any moment.

The format is that of `mmrl_core.flow.embeddings`. Every file appears under its name only when it is whole.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import psutil
from torch import Tensor

from mmrl_core.errors import DataError
from mmrl_core.flow.embeddings import (
    INDEX,
    METADATA,
    NEGATIVE,
    NEGATIVE_FILE,
    PROMPTS,
    VERSION,
    EmbeddingIndex,
    has_file,
    read_captions,
    read_index,
    tensor_key,
)

_PARTIAL = ".partial-"
"""Stands between a file's name and the host and process that is writing it."""

_WORDS = {
    "family": "the model family",
    "model_fingerprint": "the encoders",
    "dtype": "the precision",
    "max_text_tokens": "the longest prompt",
    "negative_prompt": "the negative prompt",
    "prompts": "the number of prompts",
    "prompts_digest": "the prompts",
    "shard_size": "the shard size",
}


def start_folder(folder: Path, index: EmbeddingIndex, captions: Sequence[str], *, overwrite: bool) -> None:
    """Make `folder` ready for the shards of `index`, or check that it is.

    The first process writes the prompts and the index; what later ones would write is the same. `overwrite` removes
    another index and its files. Raises DataError when the folder holds other embeddings, or something else.
    """
    assert len(captions) == index.prompts
    if overwrite:
        _clear(folder)
    _remove_abandoned(folder)
    if (folder / INDEX).exists():
        _check_same(folder, index)
        read_captions(folder, index)
        return
    others = [path.name for path in folder.iterdir() if not _is_ours(path.name)] if folder.is_dir() else []
    if others or (folder.exists() and not folder.is_dir()):
        what = f"holds {others[0]!r} and no {INDEX}" if others else "is a file"
        raise DataError(f"{folder}: {what}: not a folder of embeddings. Choose another name")
    lines = (
        json.dumps({"number": n, "caption": caption, "shard": n // index.shard_size}, ensure_ascii=False) + "\n"
        for n, caption in enumerate(captions)
    )
    with _replacing(folder / PROMPTS) as beside, beside.open("w", encoding="utf-8") as file:
        file.writelines(lines)
    with _replacing(folder / INDEX) as beside:  # last: where there is an index, there are prompts
        text = json.dumps({"version": VERSION, **asdict(index)}, indent=2, ensure_ascii=False)
        beside.write_text(text + "\n", encoding="utf-8")
    _check_same(folder, index)  # another process may have been here with other arguments


def has_shard(folder: Path, index: EmbeddingIndex, shard: int) -> bool:
    """Whether a shard is complete. Raises DataError when there is something else in its place."""
    return has_file(folder, index.shard_name(shard), index, len(index.shard_range(shard)))


def write_shard(folder: Path, index: EmbeddingIndex, shard: int, conditions: Sequence[Mapping[str, Tensor]]) -> None:
    """Store the conditions of a shard's prompts, in order. All prompts have the same names; shapes may differ."""
    numbers = index.shard_range(shard)
    assert len(conditions) == len(numbers), (len(conditions), numbers)
    tensors = {
        tensor_key(number, name): value
        for number, own in zip(numbers, conditions, strict=True)
        for name, value in own.items()
    }
    _save(folder / index.shard_name(shard), tensors, index)


def write_negative(folder: Path, index: EmbeddingIndex, conditions: Mapping[str, Tensor]) -> None:
    """Store the conditions of the negative prompt."""
    _save(folder / NEGATIVE_FILE, {NEGATIVE + name: value for name, value in conditions.items()}, index)


def _save(path: Path, tensors: Mapping[str, Tensor], index: EmbeddingIndex) -> None:
    from safetensors.torch import save_file

    owned = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with _replacing(path) as beside:
        save_file(owned, beside, metadata={METADATA: index.identity})


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place when the block ends well. Raises DataError."""
    beside = path.with_name(f".{path.name}{_PARTIAL}{socket.gethostname()}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.chmod(0o644)  # safetensors' 0600 would hide the embeddings from colleagues
        os.replace(beside, path)
    except BaseException as error:
        with suppress(OSError):  # the first error is the one to tell
            beside.unlink()
        if isinstance(error, OSError):
            raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error
        raise


def _check_same(folder: Path, index: EmbeddingIndex) -> None:
    there = read_index(folder)
    if there.identity == index.identity:
        return
    before, now = asdict(there), asdict(index)
    lines = []
    for name, words in _WORDS.items():
        if before[name] == now[name]:
            continue
        if name == "model_fingerprint":
            lines.append(f"  {words}: of {there.model} -> of {index.model}")
        elif name == "prompts_digest":
            lines.append(f"  {words}: others")
        else:
            lines.append(f"  {words} ({name}): {before[name]!r} -> {now[name]!r}")
    raise DataError(
        f"{folder}: holds other embeddings:\n" + "\n".join(lines) + "\nChoose another folder, or add --overwrite"
    )


def _is_ours(name: str) -> bool:
    base = name.removeprefix(".").partition(_PARTIAL)[0]
    return base in (INDEX, PROMPTS, NEGATIVE_FILE) or (base.startswith("shard-") and base.endswith(".safetensors"))


def _remove_abandoned(folder: Path) -> None:
    """Remove what processes of this host left behind when they were killed."""
    prefix = f"{socket.gethostname()}-"
    for path in folder.glob(f".*{_PARTIAL}*"):
        owner = path.name.rpartition(_PARTIAL)[2]
        process = owner.removeprefix(prefix)
        if (
            _is_ours(path.name)
            and owner.startswith(prefix)
            and process.isdigit()
            and not psutil.pid_exists(int(process))
        ):
            path.unlink(missing_ok=True)


def _clear(folder: Path) -> None:
    """Remove the folder's embeddings, the index first, so that nobody takes what is left for complete."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir(), key=lambda path: path.name != INDEX):
        if _is_ours(path.name):
            path.unlink()
