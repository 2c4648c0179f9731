"""Weights & Biases."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmrl_core.errors import ObserverError
from mmrl_core.hookspecs import hookimpl
from mmrl_core.media.samples import sample_pixels, visible_samples
from mmrl_core.media.videos import first_frame, require_pyav, write_video
from mmrl_core.metrics.options import WandbOptions

if TYPE_CHECKING:
    from mmrl_core.contracts import Sample
    from mmrl_core.recipe import Recipe


class WandbWriter:
    """Logs every metric against the step. A resumed run goes on in the same wandb run."""

    def __init__(self, options: WandbOptions) -> None:
        self._options = options
        self._run: Any = None
        self._wandb: Any = None
        self._ended = 0

    @hookimpl
    def mmrl_run_start(self, recipe: Recipe, run_dir: str, first_step: int) -> None:
        """Start or resume the wandb run. Raises ObserverError when wandb is missing or refuses, and MediaError when
        videos are asked for and PyAV is missing."""
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise ObserverError(
                f"writer 'wandb': the package wandb cannot be imported ({error}). "
                "Cure: pip install 'mmrl-core[wandb]', or remove wandb from the recipe's writers"
            ) from error
        options = self._options
        if options.videos:
            require_pyav("writer 'wandb' with `videos: true`")
        self._wandb = wandb
        self._ended = first_step - 1
        known = Path(run_dir) / "wandb_run_id"
        resumed = known.read_text().strip() if first_step > 1 and known.exists() else None
        try:
            self._run = wandb.init(
                project=options.project,
                entity=options.entity,
                group=options.group,
                name=recipe.name,
                tags=list(options.tags),
                config={**recipe.model_dump(mode="json"), **options.config},
                dir=run_dir,
                mode=options.mode,
                id=resumed,
                resume="allow" if resumed else None,
            )
        except Exception as error:  # wandb has no common base of what init raises
            raise ObserverError(
                f"writer 'wandb': wandb.init failed: {type(error).__name__}: {error}. Cure: run `wandb login`, or set "
                "`mode: offline` (or WANDB_MODE=offline) and upload later with `wandb sync`"
            ) from error
        known.write_text(f"{self._run.id}\n")
        # Steps of ours are an ordinary x axis: wandb's own step only grows, and would drop steps done again.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    @hookimpl
    def mmrl_step_end(self, step: int, metrics: Mapping[str, float], samples: Sequence[Sample]) -> None:
        """Log the step."""
        assert self._run is not None, "mmrl_step_end before mmrl_run_start"
        self._run.log({"step": step, **metrics})
        self._ended = step

    @hookimpl
    def mmrl_evaluation_end(self, step: int, metrics: Mapping[str, float], samples: Sequence[Sample]) -> None:
        """Log pictures of the evaluation, and its metrics unless they come with the step's."""
        assert self._run is not None, "mmrl_evaluation_end before mmrl_run_start"
        row: dict[str, Any] = {"step": step, **(metrics if step == self._ended else {})}
        with tempfile.TemporaryDirectory(prefix="mmrl-wandb-") as folder:  # wandb copies files while it logs
            shown = visible_samples(samples, self._options.eval_images)
            if shown:
                row["eval/samples"] = [self._picture(sample, Path(folder)) for sample in shown]
            if len(row) > 1:
                self._run.log(row)

    def _picture(self, sample: Sample, folder: Path) -> Any:
        pixels = sample_pixels(sample)
        caption = "  ".join(filter(None, (sample.prompt.question(), sample.shown_score())))
        if pixels.ndim == 4 and self._options.videos:
            path = folder / f"{sample.sample_id}.mp4"
            write_video(path, pixels, fps=self._options.fps)
            return self._wandb.Video(str(path), caption=caption, format="mp4")
        return self._wandb.Image(first_frame(pixels), caption=caption)

    @hookimpl
    def mmrl_run_end(self, summary: Mapping[str, Any]) -> None:
        """Store the summary and finish; a run that failed is marked so."""
        if self._run is not None:
            self._run.summary.update(dict(summary))
            self._run.finish(exit_code=1 if summary.get("outcome") == "failed" else 0)
            self._run = None
