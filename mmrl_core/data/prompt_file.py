"""A text file with one prompt a line -> Parquet files of prompts, for training and for evaluation. Imports no torch."""

from __future__ import annotations

import codecs
import hashlib
import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrl_core.data.parquet_output import ParquetOutput
from mmrl_core.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Line:
    """One prompt of a text file."""

    number: int
    """Counted from 1, blank lines included."""
    text: str


@dataclass(frozen=True, kw_only=True)
class PromptFile:
    """A text file of prompts."""

    path: str
    lines: tuple[Line, ...]
    """The lines that hold something, without white space at their ends."""
    blank: int
    """Lines that hold nothing."""
    sha256: str
    """Of the file's bytes."""


@dataclass(frozen=True, kw_only=True)
class PromptJob:
    """What to make of what."""

    input: str
    """A text file, UTF-8, one prompt a line."""
    output: Path
    """The Parquet file to write."""
    unique: bool = False
    """Keep only the first of equal lines."""
    test_fraction: float = 0.0
    """Share of the prompts that go to `test_output`: a prompt's place depends on its text alone."""
    test_output: Path | None = None
    """The Parquet file of the prompts kept apart; given exactly when `test_fraction` is above 0."""
    overwrite: bool = False
    """Replace existing outputs."""


@dataclass(frozen=True, kw_only=True)
class PromptCounts:
    """What became of the lines: blank + repeated (with `unique`) + written + test is all of them."""

    lines: int
    blank: int
    repeated: int
    """Lines equal to an earlier one, left out or not."""
    written: int
    test: int


def read_prompt_file(path: str) -> PromptFile:
    """Read a text file of prompts.

    Raises DataError naming the file, and the line where it is not UTF-8 or holds a null character.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot read it: {error.strerror or error} (working directory {Path.cwd()})"
        ) from error
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path}:1: this is UTF-16; save it as UTF-8")
    lines: list[Line] = []
    raw = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
    if not raw[-1]:
        raw.pop()
    for number, line in enumerate(raw, start=1):
        text = _decoded(line, f"{path}:{number}").strip()
        if text:
            lines.append(Line(number=number, text=text))
    if not lines:
        raise DataError(f"{path}: no line holds a prompt")
    return PromptFile(
        path=path, lines=tuple(lines), blank=len(raw) - len(lines), sha256=hashlib.sha256(content).hexdigest()
    )


def write_prompts(job: PromptJob) -> PromptCounts:
    """Write the Parquet files. Columns: `prompt`, and `index`, the prompt's place among those kept, from 0.

    Raises DataError, with nothing written: a bad input, an output that exists or cannot be written, a split that
    leaves one side empty.
    """
    assert (job.test_output is not None) == (job.test_fraction > 0)
    outputs = [path for path in (job.output, job.test_output) if path is not None]
    if len({path.absolute() for path in outputs}) < len(outputs):
        raise DataError(f"{job.output}: given for both outputs; choose two files")
    for path in outputs:
        if path.exists() and not job.overwrite:
            raise DataError(f"{path}: exists already. Remove it, choose another name, or add --overwrite")
    source = read_prompt_file(job.input)
    texts = [line.text for line in source.lines]
    first = list(dict.fromkeys(texts))
    repeated = len(texts) - len(first)
    sides: dict[Path, list[tuple[str, int]]] = {path: [] for path in outputs}
    for index, text in enumerate(first if job.unique else texts):
        apart = job.test_output is not None and split_position(text) < job.test_fraction
        sides[outputs[apart]].append((text, index))
    for path, rows in sides.items():
        if not rows:
            raise DataError(
                f"{path}: test fraction {job.test_fraction:g} of {len(texts)} prompts leaves none for this file; "
                "nothing was written"
            )
    schema = _schema(source, job)
    with ExitStack() as stack:
        made = [stack.enter_context(ParquetOutput(path, schema, overwrite=job.overwrite)) for path in outputs]
        for output, rows in zip(made, sides.values(), strict=True):
            output.write(rows)
        for output in reversed(made):  # the test file first: without it the prompts for training are not apart
            output.publish()
    return PromptCounts(
        lines=len(texts) + source.blank,
        blank=source.blank,
        repeated=repeated,
        written=len(sides[job.output]),
        test=len(sides[job.test_output]) if job.test_output is not None else 0,
    )


def split_position(text: str) -> float:
    """Where a prompt falls in [0, 1); below the fraction it belongs to the test file. A function of the text alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _decoded(line: bytes, where: str) -> str:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8: byte 0x{line[error.start]:02x} at position {error.start + 1} ({error.reason}). "
            "Save the file as UTF-8, or correct the line"
        ) from error
    if "\0" in text:
        raise DataError(f"{where}: holds a null character; is this a text file? Correct or remove the line")
    return text


def _schema(source: PromptFile, job: PromptJob) -> Any:
    import pyarrow

    made = {"input_sha256": source.sha256, "unique": job.unique, "test_fraction": job.test_fraction}
    return pyarrow.schema(
        [("prompt", pyarrow.string()), ("index", pyarrow.int64())], metadata={"mmrl": json.dumps(made)}
    )
