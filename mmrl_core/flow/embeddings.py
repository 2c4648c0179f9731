"""Precomputed prompt embeddings on disk: the folder that `mmrl data embed` writes, and loading one prompt's tensors.

A folder holds `index.json` (what was embedded, by which encoders), `prompts.jsonl` ({number, caption, shard} a line),
`shard-00000-of-00008.safetensors`, ... with the tensors `{number:08d}.{name}` of some prompts, and
`negative.safetensors` with `negative.{name}` of the negative prompt. Imports torch only to load tensors.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmrl_core.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

INDEX, PROMPTS, NEGATIVE_FILE = "index.json", "prompts.jsonl", "negative.safetensors"
NEGATIVE = "negative."
"""Prefix of the names of the negative prompt's conditions."""
VERSION = 1
"""Of the format; it grows when older readers would misunderstand a folder."""
METADATA = "mmrl_embeddings"
"""Entry of a safetensors file's metadata that says which index it belongs to."""

_OPEN_FILES = 8
"""safetensors files that are kept open: a shuffled order goes back and forth between shards."""
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class EmbeddingIndex:
    """What a folder of embeddings holds; the content of index.json beside `version`."""

    family: str
    """Model family."""
    model: str
    """Where the encoders came from; for people, since another host may have them elsewhere."""
    model_fingerprint: str
    """Of the encoders' files, see `mmrl_core.launch.embed_prompts`."""
    dtype: str
    """Precision of the encoders."""
    max_text_tokens: int | None
    """Longest prompt in tokens; None: the family's own limit."""
    negative_prompt: str
    """The text whose embedding is in negative.safetensors."""
    prompts: int
    """How many."""
    prompts_digest: str
    """Of their texts, in order."""
    shard_size: int
    """Prompts a shard; the last one may hold fewer."""

    @property
    def shards(self) -> int:
        """Number of shards."""
        return math.ceil(self.prompts / self.shard_size)

    @property
    def identity(self) -> str:
        """Of everything that shapes the tensors; every file of the folder carries it."""
        shaping = {name: value for name, value in asdict(self).items() if name != "model"}
        return hashlib.sha256(json.dumps([VERSION, shaping], sort_keys=True).encode()).hexdigest()[:32]

    def shard_name(self, shard: int) -> str:
        """File name of a shard."""
        return f"shard-{shard:05d}-of-{self.shards:05d}.safetensors"

    def shard_range(self, shard: int) -> range:
        """Numbers of the prompts in a shard."""
        return range(shard * self.shard_size, min(self.prompts, (shard + 1) * self.shard_size))


def texts_digest(texts: Sequence[str]) -> str:
    """Of texts in order."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:32]


def tensor_key(number: int, name: str) -> str:
    """Name of a prompt's tensor in its shard."""
    return f"{number:08d}.{name}"


def read_index(folder: Path) -> EmbeddingIndex:
    """The index of a folder. Raises DataError when there is none, or it is not one that this version reads."""
    path = folder / INDEX
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{folder}: no {INDEX}: not a folder of embeddings that `mmrl data embed` wrote") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    version = values.pop("version", None) if isinstance(values, dict) else None
    if version != VERSION:
        raise DataError(f"{path}: version {version!r} of the format; this mmrl reads version {VERSION}")
    names = {field.name for field in fields(EmbeddingIndex)}
    if set(values) != names:
        raise DataError(f"{path}: its fields are {sorted(values)}, not {sorted(names)}")
    return EmbeddingIndex(**values)


def has_file(folder: Path, name: str, index: EmbeddingIndex, keys: int | None = None) -> bool:
    """Whether a safetensors file of the folder is there and belongs to the index.

    `keys`: how many tensors it holds at least. Raises DataError when it is unreadable or belongs to another index.
    """
    path = folder / name
    if not path.exists():
        return False
    handle = _opened(path, "whether it is complete")
    if (handle.metadata() or {}).get(METADATA) != index.identity:
        raise DataError(
            f"{path}: belongs to other embeddings than {folder / INDEX} says (other prompts, encoders or precision). "
            "Remove it, or embed into another folder"
        )
    if keys is not None and len(handle.keys()) < keys:
        raise DataError(f"{path}: holds {len(handle.keys())} tensors instead of {keys}; remove it and embed again")
    return True


@dataclass(frozen=True, kw_only=True)
class EmbeddingFolder:
    """A complete folder of embeddings."""

    folder: Path
    index: EmbeddingIndex
    captions: tuple[str, ...]
    """The prompts, by number."""
    names: tuple[str, ...]
    """The conditions that every prompt has."""

    @classmethod
    def open(cls, path: str | Path) -> EmbeddingFolder:
        """Open a folder and check that it is complete, without reading tensors.

        Raises DataError naming what is missing, or belongs to something else.
        """
        folder = Path(path)
        index = read_index(folder)
        captions = read_captions(folder, index)
        names: tuple[str, ...] = ()
        missing = []
        for shard in range(index.shards):
            name, numbers = index.shard_name(shard), index.shard_range(shard)
            if not has_file(folder, name, index, len(numbers) * max(1, len(names))):
                missing.append(name)
            elif not names:
                keys = _opened(folder / name, "its names").keys()
                first = tensor_key(numbers[0], "")
                names = tuple(sorted(key.removeprefix(first) for key in keys if key.startswith(first)))
        if not has_file(folder, NEGATIVE_FILE, index):
            missing.append(NEGATIVE_FILE)
        if missing:
            some = ", ".join(missing[:_SHOWN]) + (f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else "")
            raise DataError(
                f"{folder}: the embeddings are not complete: {some} missing. Run `mmrl data embed` again with the same "
                "arguments (every --shard): it does what is left"
            )
        return cls(folder=folder, index=index, captions=captions, names=names)

    def references(self, number: int) -> dict[str, str]:
        """Where a prompt's conditions and those of the negative prompt are, for `load_conditions`."""
        shard = self.folder / self.index.shard_name(number // self.index.shard_size)
        own = {name: f"{shard}#{tensor_key(number, name)}" for name in self.names}
        negative = self.folder / NEGATIVE_FILE
        return {**own, **{NEGATIVE + name: f"{negative}#{NEGATIVE}{name}" for name in self.names}}


def read_captions(folder: Path, index: EmbeddingIndex) -> tuple[str, ...]:
    """The prompts of a folder, by number. Raises DataError when the file is not what the index says."""
    path = folder / PROMPTS
    try:
        with path.open(encoding="utf-8") as file:
            captions = tuple(json.loads(line)["caption"] for line in file)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot be read: {type(error).__name__}: {error}") from error
    if len(captions) != index.prompts or texts_digest(captions) != index.prompts_digest:
        raise DataError(f"{path}: these are not the prompts that {folder / INDEX} describes; embed again")
    return captions


# ------------------------------------------------------------------------------------------------------- one prompt's


def load_conditions(reference: Mapping[str, str]) -> dict[str, Tensor]:
    """A prompt's embeddings, by condition name, on the CPU, as they were stored.

    `reference` maps names to `FILE.safetensors#KEY` or `FILE.pt`, which holds one tensor (loaded with
    `weights_only=True`: no code of the file is run).

    Raises DataError naming the condition, the file and the key that is missing, unreadable, no tensor, empty or not
    finite.
    """
    if not isinstance(reference, Mapping) or not reference:
        raise DataError(
            f"embeddings {reference!r}: must map the names of conditions to FILE.safetensors#KEY or FILE.pt"
        )
    return {name: _load(name, place) for name, place in reference.items()}


def _load(name: str, place: Any) -> Tensor:
    import torch

    file, mark, key = str(place).rpartition("#")
    what = f"embedding {name!r}: {place}"
    if mark and file.endswith(".safetensors"):
        handle = _opened(Path(file), f"embedding {name!r}")
        if key not in handle.keys():  # noqa: SIM118 - a handle of safetensors, not a dict
            raise DataError(f"{what}: no tensor {key!r} in the file")
        value = handle.get_tensor(key)
    elif str(place).endswith(".pt"):
        value = _torch_file(Path(str(place)), what)
    else:
        raise DataError(f"{what}: is neither FILE.safetensors#KEY nor FILE.pt")
    if not isinstance(value, torch.Tensor):
        raise DataError(f"{what}: holds a {type(value).__name__}, not one tensor")
    if not value.numel():
        raise DataError(f"{what}: an empty tensor of shape {list(value.shape)}")
    if value.is_floating_point() and not bool(value.isfinite().all()):
        raise DataError(
            f"{what}: the tensor of shape {list(value.shape)} holds NaN or infinity; embed the prompt again"
        )
    # a view would take the whole file with it whenever the tensor is sent to another process
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def _torch_file(path: Path, what: str) -> Any:
    import pickle

    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DataError(f"{what}: cannot be read: {error.strerror or error}") from error
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, LookupError, AttributeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{what}: not a file of torch.save that can be loaded with weights_only: {first}") from error


def _opened(path: Path, what: str) -> Any:
    """An open safetensors file; the last few stay open. Raises DataError."""
    from safetensors import SafetensorError

    try:
        stat = os.stat(path)
        return _handle(str(path), stat.st_mtime_ns, stat.st_size)
    except OSError as error:
        raise DataError(f"{what}: {path}: cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise DataError(f"{what}: {path}: not a whole safetensors file: {error}") from error


@functools.lru_cache(maxsize=_OPEN_FILES)
def _handle(path: str, modified: int, size: int) -> Any:
    """`modified` and `size` tell a file that was replaced from the one that is open."""
    from safetensors import safe_open

    return safe_open(path, framework="pt")
