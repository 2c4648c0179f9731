"""RUN_DIR/images: contact sheets of samples and evaluations. This module imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmrl_core.hookspecs import hookimpl
from mmrl_core.media.images import read_image, save_image
from mmrl_core.media.samples import visible_samples
from mmrl_core.media.sheets import sample_sheet, side_by_side
from mmrl_core.media.videos import require_pyav, write_video
from mmrl_core.metrics.options import ImagesOptions

if TYPE_CHECKING:
    from mmrl_core.contracts import Sample
    from mmrl_core.recipe import Recipe

FOLDER = "images"
PROGRESS = "progress.png"

_WRITTEN = re.compile(r"(?P<kind>step|eval)_(?P<step>\d{6,})(?:_\d{4,})?\.(?:png|mp4)")


class ImagesWriter:
    """Writes `step_NNNNNN.png` and `eval_NNNNNN.png`, videos beside them when asked for, and at the end `progress.png`:
    the first, the middle and the last evaluation. Samples that are text only leave nothing behind."""

    def __init__(self, options: ImagesOptions) -> None:
        self._options = options
        self._folder: Path | None = None

    @hookimpl
    def mmrl_run_start(self, recipe: Recipe, run_dir: str, first_step: int) -> None:
        """After a resume, remove the pictures of steps that will be done again. Raises MediaError when videos are
        asked for and PyAV is missing."""
        if self._options.videos:
            require_pyav("writer 'images' with `videos: true`")
        self._folder = Path(run_dir) / FOLDER
        undone = first_step if first_step > 1 else 0  # evaluation 0 belongs to step 1
        for path, _, step in _written(self._folder):
            if step >= undone:
                path.unlink()
        (self._folder / PROGRESS).unlink(missing_ok=True)

    @hookimpl
    def mmrl_step_end(self, step: int, metrics: Mapping[str, float], samples: Sequence[Sample]) -> None:
        """Write the step's sheet when it is due."""
        if self._options.every and step % self._options.every == 0:
            self._write(f"step_{step:06d}", _title(f"step {step}", metrics.get("grpo/score/mean")), samples)

    @hookimpl
    def mmrl_evaluation_end(self, step: int, metrics: Mapping[str, float], samples: Sequence[Sample]) -> None:
        """Write the evaluation's sheet."""
        when = f"step {step}" if step else "before training"
        self._write(f"eval_{step:06d}", _title(when, metrics.get("eval/score/mean")), samples)

    @hookimpl
    def mmrl_run_end(self, summary: Mapping[str, Any]) -> None:
        """Put the first, the middle and the last evaluation side by side, when there are at least two."""
        if self._folder is None:
            return
        sheets = {step: path for path, kind, step in _written(self._folder) if kind == "eval" and path.suffix == ".png"}
        if len(sheets) > 1:
            chosen = [sheets[step] for step in first_middle_last(sheets)]
            save_image(self._folder / PROGRESS, side_by_side([read_image(path) for path in chosen]))

    def _write(self, name: str, title: str, samples: Sequence[Sample]) -> None:
        assert self._folder is not None, "a hook before mmrl_run_start"
        options = self._options
        shown = visible_samples(samples, options.samples)
        if not shown:
            return
        sheet = sample_sheet(shown, largest=options.largest, frames=options.frames, title=title)
        save_image(self._folder / f"{name}.png", sheet)
        if options.videos:
            for number, sample in enumerate(shown):
                if sample.video is not None:
                    write_video(self._folder / f"{name}_{number:04d}.mp4", sample.video, fps=options.fps)


def first_middle_last(steps: Mapping[int, Any]) -> list[int]:
    """The first, the one nearest to the middle between both, and the last; fewer when there are fewer."""
    first, last = min(steps), max(steps)
    middle = min(sorted(steps), key=lambda step: abs(2 * step - first - last))
    return sorted({first, middle, last})


def _written(folder: Path) -> list[tuple[Path, str, int]]:
    """(path, `step` or `eval`, step) of what this writer has left in the folder."""
    found = [(path, _WRITTEN.fullmatch(path.name)) for path in (folder.iterdir() if folder.is_dir() else ())]
    return [(path, match["kind"], int(match["step"])) for path, match in found if match]


def _title(when: str, score: float | None) -> str:
    return when if score is None else f"{when}: mean score {score:.4g}"
