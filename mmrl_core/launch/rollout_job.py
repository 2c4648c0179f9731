"""What every rank of `mmrl rollout` runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmrl_core.launch.jobs import is_first_rank, read_job
from mmrl_core.launch.rollout_only import RolloutJob, RolloutSummary, rollout
from mmrl_core.plugins import Selection
from mmrl_core.recipe import Recipe


def main(recipe_path: Path) -> int:
    """Run the job beside the recipe."""
    run(*read_job(recipe_path))
    return 0


def run(recipe: Recipe, selection: Selection, job: Mapping[str, Any]) -> None:
    """Generate, score and save; rank 0 shows the progress and prints the means and where the samples are."""
    wanted = RolloutJob(**{**job, "output": Path(job["output"])})
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not is_first_rank()) as bar:
        task = bar.add_task("loading", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, description="prompts", completed=done, total=total)

        summary = rollout(recipe, selection, wanted, show)
    if summary is not None:
        _print(summary, wanted.output)


def _print(summary: RolloutSummary, folder: Path) -> None:
    before = f" ({summary.found:,} prompts were there before)" if summary.found else ""
    print(f"{folder / 'rollouts.jsonl'}: {summary.prompts:,} prompts, {summary.samples:,} samples{before}")
    rows = [("reward", summary.mean), *((f"  {name}", value) for name, value in summary.per_reward.items())]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  " + ("no sample has one" if value is None else f"{value:.4f}"))
    if summary.failed:
        print(f"failed  {summary.failed:,} of {summary.samples:,} samples; the first: {summary.first_failure}")
    if summary.sheet_prompts:
        some = (
            f"the first {summary.sheet_prompts} of {summary.prompts:,}"
            if summary.sheet_prompts < summary.prompts
            else "all"
        )
        print(f"{folder / 'contact_sheet.png'}: {some} prompts")
