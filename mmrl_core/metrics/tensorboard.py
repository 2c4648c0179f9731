"""TensorBoard event files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmrl_core.hookspecs import hookimpl
from mmrl_core.metrics.options import TensorboardOptions

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from mmrl_core.contracts import Sample
    from mmrl_core.recipe import Recipe


class TensorboardWriter:
    """Writes every metric as a scalar, and now and then some samples as text, to `run_dir/tensorboard`."""

    def __init__(self, options: TensorboardOptions) -> None:
        self._options = options
        self._writer: SummaryWriter | None = None
        self._first_step = 1

    @hookimpl
    def mmrl_run_start(self, recipe: Recipe, run_dir: str, first_step: int) -> None:
        """Open an event file; TensorBoard then hides what an earlier one says of steps from `first_step` on."""
        from torch.utils.tensorboard import SummaryWriter

        self._first_step = first_step
        self._writer = SummaryWriter(str(Path(run_dir) / "tensorboard"), purge_step=first_step)

    @hookimpl
    def mmrl_step_end(self, step: int, metrics: Mapping[str, float], samples: Sequence[Sample]) -> None:
        """Write the step's scalars, and texts when they are due."""
        writer = self._writer
        assert writer is not None, "mmrl_step_end before mmrl_run_start"
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        if step == self._first_step or step % self._options.samples_every == 0:
            for i, sample in enumerate(samples[: self._options.samples]):
                if sample.text is not None:
                    writer.add_text(f"samples/{i}", _markdown(sample), step)
        writer.flush()

    @hookimpl
    def mmrl_run_end(self, summary: Mapping[str, Any]) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _markdown(sample: Sample) -> str:
    """Prompt, response and reference answer; indented, so that nothing in them is taken for markup."""
    parts = {"prompt": sample.prompt.question(), "response": sample.text or "", "answer": str(sample.answer)}
    return "\n\n".join(
        f"**{title}**\n\n" + "\n".join(f"    {line}" for line in text.splitlines()) for title, text in parts.items()
    )
