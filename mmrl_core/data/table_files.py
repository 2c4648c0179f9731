"""Files of rows: JSONL, a JSON array, Parquet. Imports no torch."""

from __future__ import annotations

import glob
import hashlib
import json
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmrl_core.errors import DataError, nearest

Row = dict[str, Any]

_BLANK = b"\xef\xbb\xbf \t\r\n"
"""What may stand before the first value of a JSON file: a byte-order mark and white space."""
_BATCH = 1024


class Table(ABC):
    """The rows of one file, numbered from 0."""

    path: str
    sha256: str
    """Of the file's bytes."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def row(self, number: int) -> Row:
        """One row. Raises DataError naming the file and the row."""

    @abstractmethod
    def rows(self, start: int, stop: int, columns: Sequence[str] | None = None) -> Iterator[Row]:
        """Rows start..stop in order; with `columns`, at least these dotted columns of each."""

    @abstractmethod
    def where(self, number: int) -> str:
        """How errors name a row: `file:line`, or `file: row N`, counted from 0, where a file has no lines."""


class JsonLines(Table):
    """One JSON object a line. Only the positions of the lines are kept in memory; blank lines are passed over."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._offsets = array("q")
        self._lines = array("q")
        digest, offset = hashlib.sha256(), 0
        with _reading(path), open(path, "rb") as file:
            for line_number, line in enumerate(file, start=1):
                digest.update(line)
                if line.strip(_BLANK):
                    self._offsets.append(offset)
                    self._lines.append(line_number)
                offset += len(line)
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._offsets)

    def row(self, number: int) -> Row:
        return next(self.rows(number, number + 1))

    def rows(self, start: int, stop: int, columns: Sequence[str] | None = None) -> Iterator[Row]:
        with _reading(self.path), open(self.path, "rb") as file:
            for number in range(start, stop):
                file.seek(self._offsets[number])
                yield self._parse(number, file.readline())

    def where(self, number: int) -> str:
        return f"{self.path}:{self._lines[number]}"

    def _parse(self, number: int, line: bytes) -> Row:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{self.where(number)}: not a JSON value ({error}). The file must hold one JSON object a line, or one "
                "JSON array"
            ) from error
        return _object(value, self.where(number))


class JsonArray(Table):
    """One JSON array of objects. It is held in memory: such a file cannot be read in parts."""

    def __init__(self, path: str) -> None:
        self.path = path
        with _reading(path):
            content = Path(path).read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            self._rows: list[Any] = json.loads(content)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: not a JSON array: {error.msg} (column {error.colno})") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not a JSON array: {error}") from error

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, number: int) -> Row:
        return _object(self._rows[number], self.where(number))

    def rows(self, start: int, stop: int, columns: Sequence[str] | None = None) -> Iterator[Row]:
        return (self.row(number) for number in range(start, stop))

    def where(self, number: int) -> str:
        return f"{self.path}: row {number}"


class Parquet(Table):
    """A Parquet file. Its columns are loaded into Arrow memory once, because a shuffled order would otherwise decode a
    whole row group for each prompt; rows become Python objects one at a time."""

    def __init__(self, path: str, columns: Sequence[str] | None = None) -> None:
        """`columns`: the dotted columns that are needed, or None: all. Raises DataError when one does not exist."""
        import pyarrow
        import pyarrow.parquet

        self.path = path
        with _reading(path):
            self.sha256 = _file_sha256(path)
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                names = list(file.schema_arrow.names)
                wanted = None if columns is None else self._top_level(columns, names)
                self._table = file.read(columns=wanted)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a readable Parquet file: {error}") from error

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def row(self, number: int) -> Row:
        row: Row = self._table.slice(number, 1).to_pylist()[0]
        return row

    def rows(self, start: int, stop: int, columns: Sequence[str] | None = None) -> Iterator[Row]:
        table = self._table
        if columns is not None:
            table = table.select(self._top_level(columns, table.column_names))
        for batch in table.slice(start, stop - start).to_batches(max_chunksize=_BATCH):
            yield from batch.to_pylist()

    def where(self, number: int) -> str:
        return f"{self.path}: row {number}"

    def _top_level(self, columns: Sequence[str], names: Sequence[str]) -> list[str]:
        """The file's columns that hold the dotted ones, each once."""
        wanted: dict[str, None] = {}
        for column in columns:
            name = column if column in names else column.partition(".")[0]
            if name not in names:
                raise MissingColumn(self.path, column, names)
            wanted[name] = None
        return list(wanted)


def open_json(path: str) -> Table:
    """A JSONL file or a JSON array, whichever it is. Raises DataError."""
    with _reading(path), open(path, "rb") as file:
        start = file.read(4096).lstrip(_BLANK)
    if start.startswith(b"PAR1"):
        raise DataError(f"{path}: this is a Parquet file; use the prompt source `parquet`")
    return JsonArray(path) if start.startswith(b"[") else JsonLines(path)


def matching_files(patterns: Sequence[str]) -> list[str]:
    """The files that paths and glob patterns name, in order; what a pattern matches is sorted by name.

    Raises DataError when one names no file, a folder, or a file that is already in the list.
    """
    found: list[str] = []
    for pattern in patterns:
        path = str(Path(pattern).expanduser())
        if Path(path).exists():
            matches = [path]
        else:
            matches = sorted(glob.glob(path, recursive=True))
        if not matches:
            what = "no file matches" if glob.has_magic(path) else "no such file"
            raise DataError(f"{pattern}: {what} (working directory {Path.cwd()})")
        for match in matches:
            if Path(match).is_dir():
                raise DataError(f"{match}: this is a folder; name its files, for example {match}/*")
            if any(Path(match).samefile(other) for other in found):
                raise DataError(f"{match}: listed twice; its rows would count twice")
            found.append(match)
    return found


def column_value(row: Mapping[str, Any], name: str, where: str) -> Any:
    """The value of a column; dots reach into nested objects unless the row has a column of the whole name.

    Raises DataError naming the columns that exist.
    """
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise MissingColumn(where, name, _all_names(row))
        value = value[part]
    return value


class MissingColumn(DataError):
    """A column that is not there."""

    def __init__(self, where: str, column: str, known: Sequence[str]) -> None:
        self.column = column
        super().__init__(
            f"{where}: no column {column!r}.{nearest(column, known)} Columns: {', '.join(known) or 'none'}"
        )


def _all_names(row: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of a row's columns, nested ones included."""
    names: list[str] = []
    for key, value in row.items():
        names.append(f"{prefix}{key}")
        if isinstance(value, Mapping):
            names.extend(_all_names(value, f"{prefix}{key}."))
    return names


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: a row must be a JSON object, not {type(value).__name__}")
    return value


def _file_sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Turns the operating system's refusal to read a file into a DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot read it: {error.strerror or error}") from error
