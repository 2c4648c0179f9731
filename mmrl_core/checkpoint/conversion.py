"""From one weight format to another: streaming, checked before and after, nothing half-written."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrl_core import __version__
from mmrl_core.checkpoint.formats import detect_format, load_format
from mmrl_core.checkpoint.matching import SHOWN, MatchedSource, Wanted, tensor_bytes
from mmrl_core.checkpoint.model_files import DIGESTS, read_config, wanted_by
from mmrl_core.checkpoint.safetensors_stream import raw_bytes
from mmrl_core.contracts import WeightFormat, WeightSource
from mmrl_core.errors import CheckpointError, ModelError

Digests = dict[str, dict[str, Any]]
"""By Hugging Face name: dtype, shape and sha256 of a tensor."""

TIED = {"model.embed_tokens.weight", "lm_head.weight"}
"""The names of a tied embedding, of which one is enough."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What `mmrl convert` is asked to do."""

    source: Path
    target: Path
    source_format: str | None
    """None: the one that recognises the folder."""
    target_format: str
    options: Any
    """The target format's validated options."""
    model: Path | None
    """The folder with the model's config and tokenizer; None: what the source comes with."""
    dtype: torch.dtype | None
    """Of floating-point tensors in the target; None: as they are."""
    verify: bool
    """Read the target again and compare."""


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What a conversion did."""

    source_format: str
    tensors: int
    bytes: int


def convert(job: Conversion, progress: Callable[[str, int, int], None]) -> Converted:
    """Write `job.target` from `job.source`, or leave nothing.

    Layout, names, shapes and room on the disk are checked before a tensor is read.

    Args:
        progress: called with (what is being done, bytes done, bytes in all).

    Raises:
        ModelError: the source is damaged or of another model, or the target format cannot express it.
        CheckpointError: the target exists or cannot be written, or, with `verify`, what was written differs from the
            source, or the source from its own digests.
        PluginError: a format is not installed.
    """
    if job.target.exists():
        raise CheckpointError(f"{job.target} exists; nothing is overwritten. Choose another folder, or remove it first")
    target_format: WeightFormat = load_format(job.target_format)(job.options)
    where = str(job.source)
    word = job.source_format or detect_format(job.source, where)
    opened = load_format(word).open(job.source, where=where, model=job.model)
    model = job.model or opened.model_folder
    wanted = _wanted(opened, model)
    opened = opened if wanted is None else MatchedSource(opened, wanted)
    source = _Read(opened, job.dtype)
    total = sum(tensor_bytes(source, name) for name in source.names())
    _check_room(job.target, total)
    with _new_folder(job.target) as folder:
        target_format.write(source, folder, model=model, progress=lambda done, of: progress("writing", done, of))
        digests = source.all_digests()
        text = json.dumps({"written_by": f"mmrl {__version__}", "weights": digests}, indent=1)
        (folder / DIGESTS).write_text(text + "\n", encoding="utf-8")
        if job.verify:
            _compare(_stored_digests(job.source), digests, f"{where}: the source", names=False)
            again = type(target_format).open(folder, where=str(job.target), model=model)
            again = again if wanted is None else MatchedSource(again, wanted)
            _compare(_digests(again, lambda done, of: progress("verifying", done, of)), digests, str(job.target))
    return Converted(source_format=word, tensors=len(source.names()), bytes=total)


def _wanted(source: WeightSource, model: Path | None) -> Sequence[Wanted] | None:
    """What the model's config asks for; None when there is no config, or when the source's names need no finding."""
    if model is None:
        return None
    twins = set(source.names()) >= TIED and read_config(model).get("tie_word_embeddings")
    return None if source.complete and not twins else wanted_by(model)


def _check_room(target: Path, size: int) -> None:
    existing = next(parent for parent in target.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if free < size:
        raise CheckpointError(
            f"{target}: {size / 2**30:.1f} GiB to write, but {existing} has {free / 2**30:.1f} GiB free"
        )


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target`, which gets its name when the block ends well and is removed otherwise."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
        partial.mkdir(parents=True)
        yield partial
        partial.rename(target)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# -------------------------------------------------------------------------------------------------------------- digests


class _Read(WeightSource):
    """Another source in the wanted dtype, which takes the digest of what is read."""

    def __init__(self, source: WeightSource, dtype: torch.dtype | None) -> None:
        self.source = source
        self.where, self.model_folder = source.where, source.model_folder
        self._dtype = dtype
        self._digests: Digests = {}

    def names(self) -> Sequence[str]:
        return self.source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        own = self.source.dtype(name)
        return self._dtype if self._dtype is not None and own.is_floating_point else own

    def read(self, name: str) -> Tensor:
        tensor = self.source.read(name).to(self.dtype(name))
        if name not in self._digests:
            self._digests[name] = _digest(tensor)
        return tensor

    def all_digests(self) -> Digests:
        """Of every tensor, in the source's order."""
        for name in self.names():
            if name not in self._digests:
                self.read(name)
        return {name: self._digests[name] for name in self.names()}


def _digest(tensor: Tensor) -> dict[str, Any]:
    sha = hashlib.sha256(raw_bytes(tensor)).hexdigest()
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "sha256": sha}


def _digests(source: WeightSource, progress: Callable[[int, int], None]) -> Digests:
    total = sum(tensor_bytes(source, name) for name in source.names())
    found: Digests = {}
    done = 0
    for name in source.names():
        found[name] = _digest(source.read(name))
        done += tensor_bytes(source, name)
        progress(done, total)
    return found


def _stored_digests(folder: Path) -> Digests | None:
    """Those that a conversion wrote beside its weights, or None."""
    file = folder / DIGESTS
    if not file.is_file():
        return None
    try:
        stored: Digests = json.loads(file.read_text(encoding="utf-8"))["weights"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file} cannot be read: {type(error).__name__}: {error}") from error
    return stored


def _compare(found: Digests | None, expected: Digests, what: str, *, names: bool = True) -> None:
    """Raise CheckpointError unless both have the same tensors. Those of another dtype (`--dtype`) are not compared.

    Args:
        names: also unless both have the same names.
    """
    if found is None:
        return
    kinds = {
        "missing": sorted(set(expected) - set(found)) if names else [],
        "unexpected": sorted(set(found) - set(expected)) if names else [],
        "different": [
            name
            for name, digest in expected.items()
            if name in found and found[name]["dtype"] == digest["dtype"] and found[name] != digest
        ],
    }
    lines = [
        f"  {kind} ({len(some)}): {'; '.join(some[:SHOWN])}{'; ...' if len(some) > SHOWN else ''}"
        for kind, some in kinds.items()
        if some
    ]
    if lines:
        raise CheckpointError(f"{what} is not what was converted:\n" + "\n".join(lines))
