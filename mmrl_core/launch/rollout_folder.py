"""The folder of `mmrl rollout`: samples with their prompts and rewards, growing row by row.

`rollouts.jsonl` has one object a sample, `images/` and `videos/` the pictures that it names, `settings.json` what
shaped the samples, so that an interrupted job goes on only where it belongs.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmrl_core.contracts import Sample
from mmrl_core.errors import RolloutError
from mmrl_core.launch.resume import differences
from mmrl_core.media.images import read_image, save_image
from mmrl_core.media.sheets import Cell, contact_sheet
from mmrl_core.media.videos import read_video, spread_frames, write_video
from mmrl_core.rewards.executor import Scored

log = logging.getLogger("mmrl.rollout")

ROWS, SETTINGS, SHEET = "rollouts.jsonl", "settings.json", "contact_sheet.png"
IMAGES, VIDEOS = "images", "videos"

SHEET_PROMPTS, SHEET_VIDEO_PROMPTS = 24, 8
"""Most prompts on the contact sheet; fewer of videos, which must be decoded whole."""
SHEET_SAMPLES = 16
"""Most samples of a prompt on the contact sheet."""

Row = dict[str, Any]

_ENCODING: dict[str, Any] = {"encoding": "utf-8", "errors": "replace"}
"""Half of a surrogate pair, which JSON files may hold, is no character."""

_PICTURE = re.compile(r"\d{6,}_\d{2,}\.(?:png|mp4)")


@dataclass(kw_only=True)
class RolloutFolder:
    """Rows of whole groups, and more to come. Only rank 0 has one."""

    path: Path
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path, settings: Mapping[str, Any], samples: int, *, overwrite: bool) -> RolloutFolder:
        """Start a folder, or go on with one whose settings are the same: groups that lack a sample are dropped.

        Raises RolloutError when it holds rollouts of other settings, or something else, or cannot be written.
        """
        with _writing(path):
            check_folder(path)
            if overwrite or not (path / SETTINGS).exists():
                path.mkdir(parents=True, exist_ok=True)
                _clear(path)
                _replace(path / SETTINGS, json.dumps(settings, indent=2) + "\n")
                return cls(path=path)
            _check_settings(path, settings)
            rows, torn = _read(path / ROWS)
            whole = _whole_groups(path, rows, samples)
            if torn or len(whole) < len(rows):
                log.info("%s: %d rows of unfinished prompts are left out", path / ROWS, len(rows) - len(whole))
                _replace(path / ROWS, _lines(whole))
            return cls(path=path, rows=whole)

    @property
    def groups(self) -> set[int]:
        """Prompts that are done."""
        return {row["group_id"] for row in self.rows}

    def append(self, rows: Sequence[Row]) -> None:
        """Add rows of whole groups; they are on the disk when this returns. Raises RolloutError."""
        ordered = sorted(rows, key=lambda row: row["sample_id"])
        with _writing(self.path / ROWS), (self.path / ROWS).open("a", **_ENCODING) as file:
            file.write(_lines(ordered))
            file.flush()
            os.fsync(file.fileno())
        self.rows += ordered

    def finish(self, title: str) -> int:
        """Put the rows in order and draw the contact sheet; returns the prompts on it: 0 when the samples are text."""
        ordered = sorted(self.rows, key=lambda row: row["sample_id"])
        if ordered != self.rows:  # prompts that an interruption cut short were done again, later
            with _writing(self.path / ROWS):
                _replace(self.path / ROWS, _lines(ordered))
            self.rows = ordered
        return self._draw(title)

    def _draw(self, title: str) -> int:
        pictured = [row for row in self.rows if row["file"] is not None]
        if not pictured:
            return 0
        videos = any(row["file"].endswith(".mp4") for row in pictured)
        groups = sorted({row["group_id"] for row in pictured})[: SHEET_VIDEO_PROMPTS if videos else SHEET_PROMPTS]
        size = min(SHEET_SAMPLES, max(row["sample"] for row in pictured) + 1)
        cells = [
            Cell(
                pixels=_picture(self.path / row["file"]),
                caption=row["prompt"],
                note="failed" if row["reward"] is None else f"{row['reward']:.4g}",
            )
            for row in pictured
            if row["group_id"] in groups and row["sample"] < size
        ]
        save_image(self.path / SHEET, contact_sheet(cells, columns=size, title=title))
        return len(groups)


def check_folder(path: Path) -> None:
    """Raise RolloutError when the path holds something else than rollouts. Names with a dot in front do not count."""
    if (path / SETTINGS).exists() or not path.exists():
        return
    if not path.is_dir() or any(inside.name[0] != "." for inside in path.iterdir()):
        raise RolloutError(f"{path}: is not empty, and holds no rollouts. Choose another --output")


def save_sample(folder: Path, sample: Sample, number: int, scored: Scored, seed: int, fps: float) -> Row:
    """Store a sample's picture, if it has one, and describe the sample. Raises MediaError.

    `number`: its place among the samples of its prompt.
    """
    name = f"{sample.group_id:06d}_{number:02d}"
    file: str | None = None
    if sample.video is not None:
        file = f"{VIDEOS}/{name}.mp4"
        write_video(folder / file, sample.video, fps=fps)
    elif sample.image is not None:
        file = f"{IMAGES}/{name}.png"
        save_image(folder / file, sample.image)
    return {
        "sample_id": sample.sample_id,
        "group_id": sample.group_id,
        "sample": number,
        "prompt": sample.prompt.question(),
        "origin": sample.prompt.origin,
        "text": sample.text,
        "file": file,
        "reward": scored.value,
        "rewards": dict(scored.per_reward),
        "sub_scores": dict(scored.sub_scores),
        "failure": scored.failure,
        "length": sample.length,
        "truncated": sample.truncated,
        "seed": seed,
    }


def _picture(path: Path) -> Any:
    """An image, or of a video the first frame."""
    return spread_frames(read_video(path)[0], 1)[0] if path.suffix == ".mp4" else read_image(path)


# ------------------------------------------------------------------------------------------------------- going on


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    try:
        before = json.loads((path / SETTINGS).read_text(encoding="utf-8"))
    except ValueError as error:
        raise RolloutError(f"{path / SETTINGS}: cannot be read: {error}; add --overwrite to start again") from error
    changed = differences(before, json.loads(json.dumps(settings)), "")
    if changed:
        lines = "\n".join(f"  {name}: {old!r} -> {new!r}" for name, old, new in changed)
        raise RolloutError(
            f"{path}: holds rollouts that were made with other settings:\n{lines}\nChoose another --output, restore "
            "these settings, or add --overwrite"
        )


def _read(path: Path) -> tuple[list[Row], bool]:
    """The rows, and whether the last line was cut short by a crash."""
    if not path.exists():
        return [], False
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    rows: list[Row] = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
            rows.append({**row, "sample_id": int(row["sample_id"]), "group_id": int(row["group_id"])})
        except (ValueError, KeyError, TypeError) as error:
            raise RolloutError(
                f"{path}:{number}: not a row of rollouts: {error!r}. Correct or remove the line, or add --overwrite"
            ) from error
    return rows, bool(lines[-1])


def _whole_groups(path: Path, rows: Sequence[Row], samples: int) -> list[Row]:
    """Rows of the groups with all their samples, and all their files."""
    found: dict[int, set[int]] = {}
    for row in rows:
        if row["file"] is None or (path / row["file"]).exists():
            found.setdefault(row["group_id"], set()).add(row["sample_id"])
    whole = {group for group, ids in found.items() if len(ids) == samples}
    return [row for row in rows if row["group_id"] in whole]


def _clear(path: Path) -> None:
    """Remove rollouts, rows first; anything else stays."""
    for name in (ROWS, SHEET):
        (path / name).unlink(missing_ok=True)
    for folder in (path / IMAGES, path / VIDEOS):
        if folder.is_dir():
            for file in folder.iterdir():
                if _PICTURE.fullmatch(file.name.lstrip(".").removesuffix(".partial")):
                    file.unlink()
            with contextlib.suppress(OSError):  # something else is in it
                folder.rmdir()


def _lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.partial")
    with beside.open("w", **_ENCODING) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


@contextlib.contextmanager
def _writing(path: Path) -> Any:
    try:
        yield
    except OSError as error:
        raise RolloutError(f"{path}: cannot be written: {error.strerror or error}") from error
