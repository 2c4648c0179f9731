"""Prompts through a model's text encoders, once, into a folder: what `mmrl data embed` does.

Several processes may share the work: each computes the shards whose number is its own modulo their number. Nothing is
exchanged between them; the folder says what is done, so that a process that was killed can be started again.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from mmrl_core.contracts import DeviceOps
from mmrl_core.data.prompt_file import read_prompt_file
from mmrl_core.data.table_files import Parquet, Table, column_value, open_json
from mmrl_core.errors import DataError
from mmrl_core.flow.embedding_shards import has_shard, start_folder, write_negative, write_shard
from mmrl_core.flow.embeddings import NEGATIVE_FILE, EmbeddingIndex, has_file, texts_digest
from mmrl_core.plugins import automatic_word, load_plugins
from mmrl_core.policies.flow.families import FAMILIES, choose_family
from mmrl_core.policies.flow.family import Family
from mmrl_core.policies.flow.options import FlowOptions
from mmrl_core.policies.flow.text_encoders import TextEncoders

log = logging.getLogger("mmrl.data")

Progress = Callable[[int, int], None]
"""Called with (prompts done, prompts in all) of this process's share; the first call counts what was there already."""

_ENCODER_FOLDERS = ("text_encoder", "tokenizer")


@dataclass(frozen=True, kw_only=True)
class EmbedJob:
    """What to embed, with what, where to."""

    prompts: str
    """A text file with one prompt a line, or a .parquet, .jsonl or .json file."""
    output: Path
    """The folder to write."""
    model: str
    """A diffusers folder or a hub id."""
    family: Literal["auto", "flux", "sd3", "wan", "dit"] = "auto"
    """The model family; auto: as the folder says."""
    column: str = "prompt"
    """Column with the prompt, of files that have columns."""
    device: str = "auto"
    """The device's word."""
    local_rank: int = 0
    """Which of this host's devices."""
    batch_size: int = 8
    """Prompts encoded at once."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of the encoders."""
    max_text_tokens: int | None = None
    """Longest prompt in tokens; None: the family's own limit."""
    shard_size: int = 256
    """Prompts a file."""
    part: tuple[int, int] = (0, 1)
    """(i, n): do the shards whose number modulo n is i."""
    negative_prompt: str = ""
    """Its embedding is stored as well."""
    overwrite: bool = False
    """Replace other embeddings in the folder."""


@dataclass(frozen=True, kw_only=True)
class EmbedSummary:
    """What was done."""

    prompts: int
    """In the whole file."""
    embedded: int
    """By this process, now."""
    found: int
    """Of this process's share, done before."""
    shards: int
    """Of the whole folder."""
    missing: tuple[str, ...]
    """Files of the folder that other processes have yet to write."""
    cut: int
    """Prompts that were too long, of those embedded now."""
    first_cut: str | None
    """Where the first of them is; None: none was too long."""
    device: str
    family: str


def embed_prompts(job: EmbedJob, progress: Progress = lambda done, total: None) -> EmbedSummary:
    """Write this process's share of the shards; those that are there are checked and left.

    Raises DataError (bad prompts; a folder that holds something else; cannot write), ModelError (encoders), DeviceError
    and PluginError (device).
    """
    texts, origins = read_prompts(job.prompts, job.column)
    options = FlowOptions(family=job.family, encoder_dtype=job.dtype, max_text_tokens=job.max_text_tokens)
    family = choose_family(job.model, options, getattr(torch, job.dtype))
    family.prepare()
    word = next(name for name, target in FAMILIES.items() if target.endswith(f":{type(family).__name__}"))
    index = EmbeddingIndex(
        family=word,
        model=str(family.folder.resolve()),
        model_fingerprint=encoders_fingerprint(family.folder),
        dtype=job.dtype,
        max_text_tokens=job.max_text_tokens,
        negative_prompt=job.negative_prompt,
        prompts=len(texts),
        prompts_digest=texts_digest(texts),
        shard_size=job.shard_size,
    )
    device: DeviceOps = load_plugins().get("device", automatic_word("device", job.device, load_plugins())).load()()
    place = device.activate(job.local_rank)
    start_folder(job.output, index, texts, overwrite=job.overwrite)
    mine = range(job.part[0], index.shards, job.part[1])
    waiting = [shard for shard in mine if not has_shard(job.output, index, shard)]
    total = sum(len(index.shard_range(shard)) for shard in mine)
    found = done = total - sum(len(index.shard_range(shard)) for shard in waiting)
    progress(done, total)
    negative = not has_file(job.output, NEGATIVE_FILE, index)
    cut: list[str] = []
    if waiting or negative:
        encoders = family.load_encoders().eval().requires_grad_(False).to(place)
        if negative:
            [conditions] = _encoded(family, encoders, [job.negative_prompt], ["--negative-prompt"], cut)
            write_negative(job.output, index, conditions)
        for shard in waiting:
            numbers = index.shard_range(shard)
            made: list[dict[str, Tensor]] = []
            for first in range(numbers.start, numbers.stop, job.batch_size):
                batch = slice(first, min(first + job.batch_size, numbers.stop))
                made += _encoded(family, encoders, texts[batch], origins[batch], cut)
                progress(done + len(made), total)
            write_shard(job.output, index, shard, made)
            done += len(made)
    missing = [index.shard_name(s) for s in range(index.shards) if not has_shard(job.output, index, s)]
    return EmbedSummary(
        prompts=len(texts),
        embedded=done - found,
        found=found,
        shards=index.shards,
        missing=tuple(missing),
        cut=len(cut),
        first_cut=cut[0] if cut else None,
        device=str(place),
        family=word,
    )


def read_prompts(path: str, column: str) -> tuple[list[str], list[str]]:
    """Prompts of a file and how errors name each of them.

    Raises DataError naming the line or row that holds no text.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".txt":
        lines = read_prompt_file(path).lines
        return [line.text for line in lines], [f"{path}:{line.number}" for line in lines]
    if suffix not in (".parquet", ".jsonl", ".json"):
        raise DataError(f"{path}: prompts are read from .txt (one a line), .parquet, .jsonl or .json files")
    table: Table = Parquet(path, [column]) if suffix == ".parquet" else open_json(path)
    texts: list[str] = []
    origins = [table.where(number) for number in range(len(table))]
    for row, where in zip(table.rows(0, len(table), [column]), origins, strict=True):
        value = column_value(row, column, where)
        if not isinstance(value, str) or not value.strip():
            what = "an empty text" if isinstance(value, str) else f"of type {type(value).__name__}"
            raise DataError(f"{where}: column {column!r} is {what}; a prompt to embed is a text (choose with --column)")
        texts.append(value)
    if not texts:
        raise DataError(f"{path}: the file holds no rows")
    return texts, origins


def encoders_fingerprint(folder: Path) -> str:
    """Of a pipeline's text encoders and tokenizers: names and sizes of their files, and the content of small ones.

    The same wherever the folder is, and another for another model; weights of equal size that were changed in place are
    not noticed.
    """
    digest = hashlib.sha256()
    names = sorted(p for p in folder.iterdir() if p.is_dir() and p.name.startswith(_ENCODER_FOLDERS))
    files = [folder / "model_index.json", *(f for part in names for f in sorted(part.rglob("*")) if f.is_file())]
    for file in files:
        digest.update(f"{file.relative_to(folder).as_posix()} {file.stat().st_size}\n".encode())
        if file.suffix == ".json":
            digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def _encoded(
    family: Family, encoders: nn.Module, texts: Sequence[str], origins: Sequence[str], cut: list[str]
) -> list[dict[str, Tensor]]:
    """Conditions of each text; origins of those that were too long are added to `cut`.

    Raises DataError naming the first text that the family refuses.
    """
    with torch.no_grad():
        try:
            conditions = family.encode(encoders, texts)
            if isinstance(encoders, TextEncoders):
                cut += [origins[row] for row in encoders.cut_rows]
            return conditions
        except DataError:
            for text, origin in zip(texts, origins, strict=True):
                try:
                    family.encode(encoders, [text])
                except DataError as error:
                    raise DataError(f"{origin}: {error}") from error
            raise


def default_part() -> tuple[int, int]:
    """(0, 1), or under torchrun this process's rank and the number of processes."""
    rank, size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    return (int(rank), int(size)) if rank.isdigit() and size.isdigit() and int(rank) < int(size) else (0, 1)
