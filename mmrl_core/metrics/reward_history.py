"""The mean reward of every step as plain text, one number a line. This module imports no torch."""

from __future__ import annotations

import itertools
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mmrl_core.errors import ObserverError
from mmrl_core.hookspecs import hookimpl
from mmrl_core.metrics.options import RewardHistoryOptions

if TYPE_CHECKING:
    from mmrl_core.contracts import Sample
    from mmrl_core.recipe import Recipe

log = logging.getLogger("mmrl.metrics")

_TORN = re.compile(r"[-+.\deinfa\0]*")
"""What a crash may leave of a line: the beginning of a number, or a block that was never written."""


class RewardHistoryWriter:
    """Line n is the mean reward of step n, `nan` when no sample of the step was scored."""

    def __init__(self, options: RewardHistoryOptions) -> None:
        self._options = options
        self._file: IO[str] | None = None

    @hookimpl
    def mmrl_run_start(self, recipe: Recipe, run_dir: str, first_step: int) -> None:
        """Open the file; after a resume, cut off the lines of steps that will be done again.

        A run that starts at step 1 begins a new file; one that an earlier run left outside the run folder is kept
        under another name. Raises ObserverError, and changes nothing, when a resumed run finds a file that is not its
        own: a line that is no number, or fewer lines than steps done.
        """
        folder = Path(run_dir)
        path = folder / self._options.path
        path.parent.mkdir(parents=True, exist_ok=True)
        if first_step == 1:
            own = path.resolve().is_relative_to(folder.resolve())
            _begin(path, own)
        else:
            _cut(path, first_step - 1)
        self._file = path.open("a", encoding="utf-8")

    @hookimpl
    def mmrl_step_end(self, step: int, metrics: Mapping[str, float], samples: Sequence[Sample]) -> None:
        """Append the step's line."""
        assert self._file is not None, "mmrl_step_end before mmrl_run_start"
        self._file.write(f"{float(metrics.get('grpo/score/mean', math.nan))!r}\n")
        self._file.flush()

    @hookimpl
    def mmrl_run_end(self, summary: Mapping[str, Any]) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read_history(path: Path) -> list[float]:
    """The mean reward of each step. A last line without its line end, which a crash cut short, is left out.

    Raises ObserverError naming the file, and the line when it is no number.
    """
    return [value for value, _ in _lines(path)]


def _begin(path: Path, own: bool) -> None:
    if not path.exists() or not path.stat().st_size:
        return
    if own:
        _cut(path, 0)
        return
    _lines(path)  # raises for what is no history, before it is touched
    aside = next(p for n in itertools.count(1) if not (p := path.with_name(f"{path.name}.{n}")).exists())
    path.rename(aside)
    log.warning("%s holds the history of another run; it is now %s", path, aside)


def _cut(path: Path, steps: int) -> None:
    lines = _lines(path)
    if len(lines) < steps:
        raise ObserverError(
            f"{path}: holds {len(lines)} whole lines, but {steps} steps are done: it is not this run's history. "
            "Cure: put the run's own file there, or take the writer `reward_history` out or give it another path in a "
            "run that starts anew"
        )
    kept = "".join(line + "\n" for _, line in lines[:steps]).encode()
    if kept == path.read_bytes():
        return
    beside = path.with_name(f".{path.name}.partial")
    with beside.open("wb") as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    log.info("%s: lines from step %d on were cut off; they are written again", path, steps + 1)


def _lines(path: Path) -> list[tuple[float, str]]:
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise ObserverError(f"{path}: the reward history cannot be read: {error}") from error
    lines = text.split("\n")
    torn = lines.pop()
    values = [(_number(path, number, line), line) for number, line in enumerate(lines, start=1)]
    if not _TORN.fullmatch(torn):
        _number(path, len(lines) + 1, torn)
    if torn:
        log.warning("%s: the last line is incomplete and left out", path)
    return values


def _number(path: Path, number: int, line: str) -> float:
    try:
        return float(line)
    except ValueError:
        raise ObserverError(
            f"{path}:{number}: {line[:40]!r} is no number, so this is not a reward history. Cure: give the writer "
            "`reward_history` another path, or remove the file"
        ) from None
