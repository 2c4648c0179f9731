"""metrics.jsonl: one JSON object a step. This module imports no torch."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mmrl_core.errors import ObserverError
from mmrl_core.hookspecs import hookimpl
from mmrl_core.metrics.options import JsonlOptions

if TYPE_CHECKING:
    from mmrl_core.contracts import Sample
    from mmrl_core.recipe import Recipe

log = logging.getLogger("mmrl.metrics")


class JsonlWriter:
    """Writes `{"step": n, name: value, ...}` a line, flushed every step. A value that is not finite is null."""

    def __init__(self, options: JsonlOptions) -> None:
        self._options = options
        self._file: IO[str] | None = None

    @hookimpl
    def mmrl_run_start(self, recipe: Recipe, run_dir: str, first_step: int) -> None:
        """Open the file; after a resume, cut off the rows of steps that will be done again."""
        path = Path(run_dir) / self._options.file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            cut_from(path, first_step)
        self._file = path.open("a", encoding="utf-8")

    @hookimpl
    def mmrl_step_end(self, step: int, metrics: Mapping[str, float], samples: Sequence[Sample]) -> None:
        """Append the step's row."""
        assert self._file is not None, "mmrl_step_end before mmrl_run_start"
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        self._file.flush()

    @hookimpl
    def mmrl_run_end(self, summary: Mapping[str, Any]) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, in its order. A last line that a crash cut short is left out.

    Raises ObserverError naming the file and the line when any other line is no row.
    """
    return [row for row, _ in _rows(path)]


def cut_from(path: Path, first_step: int) -> None:
    """Remove the rows with step >= `first_step`, and a last line that a crash cut short.

    The shortened file is written beside and renamed, so a crash leaves either the old or the new one.
    """
    lines = [line for row, line in _rows(path) if row["step"] < first_step]
    kept = "".join(line + "\n" for line in lines)
    if kept.encode() == path.read_bytes():
        return
    beside = path.with_name(f".{path.name}.partial")
    with beside.open("w", encoding="utf-8") as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    log.info("%s: rows from step %d on were cut off; they are written again", path, first_step)


def _rows(path: Path) -> list[tuple[dict[str, Any], str]]:
    text = path.read_bytes().decode("utf-8", errors="replace")
    lines = text.split("\n")
    rows: list[tuple[dict[str, Any], str]] = []
    for number, line in enumerate(lines, start=1):
        last = number == len(lines)
        if last and not line:
            break
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("no object with an integer 'step'")
        except ValueError as error:
            if last:
                log.warning("%s: the last line is incomplete and left out", path)
                break
            raise ObserverError(
                f"{path}:{number}: not a row of metrics: {error}. Cure: correct or remove the line"
            ) from error
        rows.append((row, line))
    return rows
