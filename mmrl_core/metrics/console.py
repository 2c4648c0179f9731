"""Live progress on the terminal, and plain lines where there is none. This module imports no torch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from mmrl_core.hookspecs import hookimpl
from mmrl_core.metrics.options import ConsoleOptions

if TYPE_CHECKING:
    from mmrl_core.contracts import Sample
    from mmrl_core.recipe import Recipe

_RECENT_STEPS = 10
"""The time left is estimated from so many steps, so that a slow first step is soon forgotten."""

_OUTCOME_STYLES = {"finished": "green", "stopped": "yellow", "failed": "red"}


class ConsoleWriter:
    """One kept line a step and, on a terminal, a progress bar below; a summary panel when the run ends."""

    def __init__(self, options: ConsoleOptions, console: Console | None = None) -> None:
        self._options = options
        self._console = console or Console()
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._total = 0
        self._ends: deque[float] = deque(maxlen=_RECENT_STEPS + 1)
        self._samples: Sequence[Sample] = ()

    @hookimpl
    def mmrl_run_start(self, recipe: Recipe, run_dir: str, first_step: int) -> None:
        """Say what starts and show the bar."""
        self._total = recipe.algorithm.steps
        self._ends.append(time.monotonic())
        resumed = f", resuming at step {first_step}" if first_step > 1 else ""
        self._print(Text(f"{recipe.name}: {self._total} steps of {recipe.model.path} into {run_dir}{resumed}"))
        if self._console.is_terminal:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("training"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                console=self._console,
                refresh_per_second=2,
                expand=True,
            )
            self._task = self._progress.add_task("training", total=self._total, completed=first_step - 1, left="")
            self._progress.start()

    @hookimpl
    def mmrl_step_end(self, step: int, metrics: Mapping[str, float], samples: Sequence[Sample]) -> None:
        """Print the step's line."""
        self._ends.append(time.monotonic())
        self._samples = samples
        pace = (self._ends[-1] - self._ends[0]) / max(1, len(self._ends) - 1)
        left = f"{duration(pace * (self._total - step))} left" if step < self._total else ""
        self._print(step_line(step, self._total, metrics, left))
        if self._progress is not None:
            self._progress.update(self._task, completed=step, left=left)

    @hookimpl
    def mmrl_evaluation_end(self, step: int, metrics: Mapping[str, float], samples: Sequence[Sample]) -> None:
        """Print the score before training; that of a step stands on the step's line."""
        score = metrics.get("eval/score/mean")
        if step == 0 and score is not None:
            self._print(Text.assemble(("before training", "bold"), (f"  held-out {score:.3f}", "bold cyan")))

    @hookimpl
    def mmrl_run_end(self, summary: Mapping[str, Any]) -> None:
        """Take the bar down and print the summary."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._options.samples and self._samples:
            self._show_samples(self._samples[: self._options.samples])
        rows = summary_rows(summary)
        outcome = str(summary.get("outcome", "ended"))
        if not self._console.is_terminal:
            self._print(Text(f"run {outcome}"))
            for title, value in rows:
                self._print(Text(f"  {title}: {value}"))
            return
        table = Table.grid(padding=(0, 2))
        for title, value in rows:
            table.add_row(Text(title, style="dim"), Text(value, overflow="fold"))
        style = _OUTCOME_STYLES.get(outcome, "blue")
        self._console.print(Panel(table, title=f"run {outcome}", border_style=style, expand=False, padding=(1, 2)))

    def _print(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True, highlight=False)

    def _show_samples(self, samples: Sequence[Sample]) -> None:
        limit = self._options.sample_characters
        if not self._console.is_terminal:
            for sample in samples:
                for title, value in _sample_cells(sample, limit):
                    self._print(Text(f"  {title}: {value!r}"))
            return
        table = Table(title="samples of the last step", show_lines=True)
        for title in ("prompt", "response", "answer", "score"):
            table.add_column(title, overflow="fold")
        for sample in samples:
            table.add_row(*(Text(value) for _, value in _sample_cells(sample, limit)))
        self._console.print(table)


def step_line(step: int, total: int, metrics: Mapping[str, float], left: str) -> Text:
    """The line of one step: what is unknown is left out."""
    width = len(str(total))
    line = Text(f"step {step:>{width}}/{total}", style="bold")
    reward = metrics.get("grpo/score/mean", metrics.get("grpo/rewards/mean"))
    seconds = metrics.get("timing/all")
    if reward is not None:
        line.append(f"  reward {reward:7.3f}", style="green")
    if "response_length/mean" in metrics:
        line.append(f"  length {metrics['response_length/mean']:6.1f}", style="not bold")
    if seconds is not None and seconds > 0:
        if "perf/tokens" in metrics:
            line.append(f"  {metrics['perf/tokens'] / seconds:8,.0f} tokens/s", style="not bold")
        elif "perf/samples_per_second" in metrics:
            line.append(f"  {metrics['perf/samples_per_second']:6.1f} samples/s", style="not bold")
        line.append(f"  {seconds:6.2f} s", style="not bold")
    if left:
        line.append(f"  {left}", style="not bold dim")
    if "eval/score/mean" in metrics:
        line.append(f"  held-out {metrics['eval/score/mean']:.3f}", style="bold cyan")
    for name, words in (
        ("rewards/failed_samples", "failed samples"),
        ("rewards/dropped_groups", "dropped groups"),
        ("actor/skipped_updates", "skipped updates"),
    ):
        if metrics.get(name, 0.0) > 0:
            line.append(f"  {metrics[name]:.0f} {words}", style="bold yellow")
    return line


def summary_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(title, value) of what the summary has to say."""
    rows: list[tuple[str, str]] = []

    def add(title: str, value: Any, form: str = "") -> None:
        if value is not None:
            rows.append((title, format(value, form)))

    add("steps", summary.get("steps"))
    seconds = summary.get("seconds")
    add("time", None if seconds is None else duration(seconds))
    first, last = summary.get("first_reward"), summary.get("last_reward")
    if first is not None and last is not None:
        rows.append(("reward", f"{first:.3f} -> {last:.3f} ({last - first:+.3f}; first and last 5 steps)"))
    add("tokens/s", summary.get("tokens_per_second"), ",.0f")
    held_out = summary.get("eval")
    if held_out:
        rows.append(("held-out", _held_out(held_out)))
    for key, title in (
        ("run_dir", "run folder"),
        ("checkpoint", "checkpoint"),
        ("export", "exported model"),
        ("picture", "picture"),
    ):
        add(title, summary.get(key))
    return [(title, value) for title, value in rows if value]


def duration(seconds: float) -> str:
    """`m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _held_out(found: Mapping[str, Any]) -> str:
    """The score (before training, too, when it was measured) and, when there are several, the mean of each reward."""
    before = found.get("first") or {}
    pairs = [("score", before.get("score"), found["score"])]
    if len(found["rewards"]) > 1:
        pairs += [(name, before.get("rewards", {}).get(name), value) for name, value in found["rewards"].items()]
    words = [f"{name} {'' if old is None else f'{old:.4g} -> '}{new:.4g}" for name, old, new in pairs]
    return f"{', '.join(words)} (prompts: {found['prompts']})"


def _response(sample: Sample) -> str:
    """The text, or else kind and size: `image HxW`, `video FxHxW`."""
    if sample.text is not None:
        return sample.text
    for kind, pixels in (("image", sample.image), ("video", sample.video)):
        if pixels is not None:
            return f"{kind} {'x'.join(str(side) for side in pixels.shape[:-1])}"
    return ""


def _sample_cells(sample: Sample, limit: int) -> list[tuple[str, str]]:
    answer = "" if sample.answer is None else str(sample.answer)
    cells = {
        "prompt": sample.prompt.question(),
        "response": _response(sample),
        "answer": answer,
        "score": sample.shown_score(),
    }
    return [(title, text if len(text) <= limit else text[: limit - 3] + "...") for title, text in cells.items()]
