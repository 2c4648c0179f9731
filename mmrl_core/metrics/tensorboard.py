"""TensorBoard event files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmrl_core.hookspecs import hookimpl
from mmrl_core.media.samples import sample_pixels, visible_samples
from mmrl_core.media.videos import first_frame
from mmrl_core.metrics.options import TensorboardOptions

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from mmrl_core.contracts import Sample
    from mmrl_core.recipe import Recipe


class TensorboardWriter:
    """Writes every metric as a scalar, and now and then some samples as text and images, to `run_dir/tensorboard`."""

    def __init__(self, options: TensorboardOptions) -> None:
        self._options = options
        self._writer: SummaryWriter | None = None
        self._first_step = 1
        self._ended = 0

    @hookimpl
    def mmrl_run_start(self, recipe: Recipe, run_dir: str, first_step: int) -> None:
        """Open an event file; TensorBoard then hides what an earlier one says of steps from `first_step` on."""
        from torch.utils.tensorboard import SummaryWriter

        self._first_step = first_step
        self._ended = first_step - 1
        undone = first_step if first_step > 1 else 0  # evaluation 0 belongs to step 1
        self._writer = SummaryWriter(str(Path(run_dir) / "tensorboard"), purge_step=undone)

    @hookimpl
    def mmrl_step_end(self, step: int, metrics: Mapping[str, float], samples: Sequence[Sample]) -> None:
        """Write the step's scalars, and texts and images when they are due."""
        writer = self._writer
        assert writer is not None, "mmrl_step_end before mmrl_run_start"
        self._ended = step
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        if step == self._first_step or step % self._options.samples_every == 0:
            for i, sample in enumerate(samples[: self._options.samples]):
                if sample.text is not None:
                    writer.add_text(f"samples/{i}", _markdown(sample), step)
            self._add_images("samples", samples, self._options.step_images, step)
        writer.flush()

    @hookimpl
    def mmrl_evaluation_end(self, step: int, metrics: Mapping[str, float], samples: Sequence[Sample]) -> None:
        """Write images of the evaluation, and its scalars unless they come with the step's."""
        writer = self._writer
        assert writer is not None, "mmrl_evaluation_end before mmrl_run_start"
        if step == self._ended:
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)
        self._add_images("eval", samples, self._options.eval_images, step)
        writer.flush()

    @hookimpl
    def mmrl_run_end(self, summary: Mapping[str, Any]) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _add_images(self, tag: str, samples: Sequence[Sample], most: int, step: int) -> None:
        assert self._writer is not None
        for i, sample in enumerate(visible_samples(samples, most)):
            self._writer.add_image(f"{tag}/image/{i}", first_frame(sample_pixels(sample)), step, dataformats="HWC")


def _markdown(sample: Sample) -> str:
    """Prompt, response, reference answer and score; indented, so that nothing in them is taken for markup."""
    parts = {
        "prompt": sample.prompt.question(),
        "response": sample.text or "",
        "answer": str(sample.answer),
        "score": sample.shown_score(),
    }
    return "\n\n".join(
        f"**{title}**\n\n" + "\n".join(f"    {line}" for line in text.splitlines()) for title, text in parts.items()
    )
