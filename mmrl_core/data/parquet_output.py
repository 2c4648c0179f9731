"""A Parquet file that appears under its name only when it is complete. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmrl_core.errors import DataError


class ParquetOutput:
    """Within the block a hidden file beside `path` is written; `publish` gives it its name, once it is on the disk.

    What is not published is removed. Raises DataError naming `path` when it exists although it must not be replaced,
    or when the operating system refuses.
    """

    def __init__(self, path: Path, schema: Any, *, overwrite: bool) -> None:
        """`schema`: the pyarrow schema of the columns."""
        self._path, self._schema, self._overwrite = path, schema, overwrite
        self._partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
        if path.exists() and not overwrite:
            raise DataError(f"{path}: exists already. Remove it, choose another name, or add --overwrite")

    def __enter__(self) -> ParquetOutput:
        import pyarrow.parquet

        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pyarrow.parquet.ParquetWriter(self._partial, self._schema)
        except OSError as error:
            raise self._cannot_write(error) from error
        return self

    def write(self, rows: Sequence[Sequence[Any]]) -> None:
        """Append rows, each with the values of the schema's columns in order."""
        import pyarrow

        columns = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in self._schema.names]
        try:
            self._writer.write_table(pyarrow.table(columns, schema=self._schema))
        except OSError as error:
            raise self._cannot_write(error) from error

    def publish(self) -> None:
        """Finish the file and give it its name."""
        try:
            self._writer.close()
            with open(self._partial, "rb+") as file:
                os.fsync(file.fileno())
            if self._path.exists() and not self._overwrite:
                raise DataError(f"{self._path}: appeared while this was running; nothing was written")
            os.replace(self._partial, self._path)
            folder = os.open(self._path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise self._cannot_write(error) from error

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._partial.exists():  # not published
            with suppress(OSError):  # the disk is full, perhaps; the file is being thrown away
                self._writer.close()
            self._partial.unlink()

    def _cannot_write(self, error: OSError) -> DataError:
        return DataError(f"{self._path}: cannot write it: {error.strerror or error}; nothing was written")
