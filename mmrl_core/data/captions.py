"""Prompts whose embeddings were computed before: a folder of `mmrl data embed`, or the `videos2caption.json` layout.

Imports no torch before the first embedding is tried.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from mmrl_core.contracts import Prompt, PromptSource
from mmrl_core.data.options import EmbeddedCaptionsOptions
from mmrl_core.data.order import EpochOrder
from mmrl_core.data.table_files import column_value, open_json
from mmrl_core.errors import DataError
from mmrl_core.flow.embeddings import INDEX, NEGATIVE, EmbeddingFolder, load_conditions

LAYOUT = {
    "prompt_embeds": ("prompt_embed_path", "prompt_embed"),
    "pooled_prompt_embeds": ("pooled_prompt_embeds_path", "pooled_prompt_embeds"),
    NEGATIVE + "prompt_embeds": ("negative_prompt_embeds_path", "negative_prompt_embeds"),
}
"""Of each condition, in a videos2caption.json: the key with the file's name, and the folder beside the JSON file.

FLUX has the first two, Wan the first and the last. `text_ids` are not read: they follow from the number of tokens.
"""
REQUIRED = "prompt_embeds"
CAPTION = "caption"


class Embedded(ABC):
    """Prompts, by row from 0, and where their embeddings are."""

    identity: str
    """Changes when prompts or embeddings do."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def caption(self, row: int) -> str:
        """The prompt's text."""

    @abstractmethod
    def reference(self, row: int) -> Mapping[str, str]:
        """Where its conditions are, as `load_conditions` takes them."""

    @property
    def negative_prompt(self) -> str | None:
        """The text of the negative prompt that was embedded with them; None: not known, or there is none."""
        return None

    @abstractmethod
    def where(self, row: int) -> str:
        """How errors name it."""


class OwnFolder(Embedded):
    """A folder that `mmrl data embed` wrote."""

    def __init__(self, path: Path) -> None:
        self._folder = EmbeddingFolder.open(path)
        self.identity = self._folder.index.identity

    def __len__(self) -> int:
        return len(self._folder.captions)

    def caption(self, row: int) -> str:
        return self._folder.captions[row]

    def reference(self, row: int) -> Mapping[str, str]:
        return self._folder.references(row)

    @property
    def negative_prompt(self) -> str | None:
        return self._folder.index.negative_prompt

    def where(self, row: int) -> str:
        return f"{self._folder.folder}: prompt {row}"


class CaptionFile(Embedded):
    """A videos2caption.json with folders of one `.pt` file a prompt beside it."""

    def __init__(self, path: Path) -> None:
        """Raises DataError naming the row whose caption or file is missing."""
        table = open_json(str(path))
        self._path, self._captions, self._files = path, list[str](), list[Mapping[str, str]]()
        digest = hashlib.sha256(table.sha256.encode())
        names: list[str] = []
        for number, row in enumerate(table.rows(0, len(table))):
            where = table.where(number)
            caption = column_value(row, CAPTION, where)
            if not isinstance(caption, str) or not caption.strip():
                raise DataError(f"{where}: {CAPTION!r} must be a text that is not empty, not {caption!r}")
            if not names:
                names = [name for name, (key, _) in LAYOUT.items() if key in row or name == REQUIRED]
            files = {}
            for name in names:
                key, folder = LAYOUT[name]
                file = column_value(row, key, where)
                if not isinstance(file, str) or not file.endswith(".pt"):
                    raise DataError(f"{where}: {key!r} must be the name of a .pt file in {folder}/, not {file!r}")
                files[name] = str(path.parent / folder / file)
                digest.update(f"{name} {file} {_size(files[name], f'{where}: {key!r}')}\n".encode())
            self._captions.append(caption)
            self._files.append(files)
        self.identity = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._captions)

    def caption(self, row: int) -> str:
        return self._captions[row]

    def reference(self, row: int) -> Mapping[str, str]:
        return self._files[row]

    def where(self, row: int) -> str:
        return f"{self._path}: row {row}"


class EmbeddedCaptionsSource(PromptSource):
    """Captions as raw text; the column `embeddings` says where each prompt's conditions are, and `negative_prompt` what
    text the negative ones among them are of, when that is known."""

    options: EmbeddedCaptionsOptions

    def __init__(self, options: EmbeddedCaptionsOptions, seed: int) -> None:
        super().__init__(options, seed)
        self._data: Embedded | None = None
        self._order: EpochOrder | None = None

    def prepare(self) -> None:
        """Open the data, check that every file is there, and load the first prompt's embeddings. Raises DataError."""
        options = self.options
        self._data = data = open_embedded(options.path)
        stop = len(data) if options.limit is None else min(len(data), options.skip + options.limit)
        if options.skip >= stop:
            raise DataError(f"{options.path}: skip {options.skip} leaves nothing of {len(data)} prompts")
        try:
            load_conditions(data.reference(options.skip))
        except DataError as error:
            raise DataError(f"{data.where(options.skip)}: {error}") from error
        self._order = EpochOrder(stop - options.skip, self.seed, shuffle=options.shuffle)

    def __len__(self) -> int:
        return self._order.length if self._order is not None else 0

    def prompt(self, index: int) -> Prompt:
        """The `index`-th prompt of the run."""
        assert self._order is not None, "prepare() comes first"
        assert self._data is not None
        row = self.options.skip + self._order.row(index)
        negative = self._data.negative_prompt
        return Prompt(
            index=index,
            text=self._data.caption(row),
            columns={
                "embeddings": dict(self._data.reference(row)),
                **({} if negative is None else {"negative_prompt": negative}),
            },
            origin=self._data.where(row),
        )

    def digest(self) -> str:
        """Of the captions in order, what the embeddings were made with (of `.pt` files: their names and sizes, not
        their contents), the options and the seed."""
        assert self._data is not None, "prepare() comes first"
        described = [self._data.identity, self.options.model_dump(mode="json", exclude={"path"}), self.seed]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def open_embedded(path: str) -> Embedded:
    """The prompts of a folder of `mmrl data embed`, of a videos2caption.json, or of a folder with one. Raises
    DataError."""
    place = Path(path).expanduser()
    if not place.exists():
        raise DataError(f"{path}: no such file or folder (working directory {Path.cwd()})")
    if place.is_dir():
        inside = place / "videos2caption.json"
        if (place / INDEX).exists() or not inside.exists():
            return OwnFolder(place)
        place = inside
    data = CaptionFile(place)
    if not len(data):
        raise DataError(f"{path}: the file holds no prompts")
    return data


def _size(file: str, what: str) -> int:
    try:
        return os.stat(file).st_size
    except OSError as error:
        raise DataError(f"{what}: {file}: {error.strerror or error}") from error
