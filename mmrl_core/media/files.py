"""Files that are there whole or not at all. Imports no torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from mmrl_core.errors import MediaError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a name beside `path` to write to. When the block ends well it is renamed to `path`; else it is removed,
    and what was at `path` stays.

    Raises MediaError naming `path` when the operating system refuses.
    """
    beside = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        with beside.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(beside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            beside.unlink()
        if isinstance(error, OSError):
            raise MediaError(f"{path}: cannot be written: {error}") from error
        raise
