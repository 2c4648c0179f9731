"""`mmrl rollout RECIPE`: generate, score and save samples without training."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from mmrl_core.cli.arguments import positive
from mmrl_core.errors import RecipeError
from mmrl_core.plugins import load_plugins, resolve
from mmrl_core.recipe import Recipe, load_recipe
from mmrl_core.resolved import complete, require_available

if TYPE_CHECKING:
    from mmrl_core.launch.rollout_only import RolloutSummary


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "rollout",
        help="generate, score and save samples without training",
        description="Generate samples for a recipe's prompts, score them with its rewards and save texts, images or "
        "videos with their prompts and rewards. Started again, an interrupted command goes on where it was.",
        epilog="Under torchrun, ranks share the prompts; the samples are the same on any number of ranks.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example seed=1 sampling.steps=40")
    parser.add_argument(
        "--prompts",
        type=_count,
        metavar="N",
        help="the first N prompts in the recipe's order, or all of them; by default algorithm.prompts_per_step, with "
        "--eval eval.prompts",
    )
    parser.add_argument(
        "--samples",
        type=positive,
        metavar="N",
        help="samples a prompt; by default algorithm.samples_per_prompt, with --eval eval.samples_per_prompt",
    )
    parser.add_argument("--eval", action="store_true", help="prompts and sampling of the recipe's eval section")
    parser.add_argument(
        "--model", metavar="PATH", help="a model folder instead of the recipe's, such as a run's export"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="the folder to write, or to go on with; by default rollouts in the run folder, with --eval rollouts_eval",
    )
    parser.add_argument(
        "--batch-prompts",
        type=positive,
        metavar="N",
        help="prompts at once on each rank; what is done is saved after each batch. By default 1 for images and video, "
        "16 for text",
    )
    parser.add_argument("--overwrite", action="store_true", help="remove rollouts that are in FOLDER and start anew")
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the means and where the samples are."""
    recipe, source = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.eval and recipe.eval is None:
        raise RecipeError(f"{arguments.recipe}: `mmrl rollout --eval` needs an `eval` section (data, prompts)")
    plugins = load_plugins()
    selection = resolve(recipe, source, plugins)
    require_available(selection)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from mmrl_core.launch.rollout_only import RolloutJob, rollout

    prompts, samples, folder = _defaults(recipe, arguments.eval)
    job = RolloutJob(
        output=arguments.output or folder,
        prompts=prompts if arguments.prompts is None else (arguments.prompts or None),
        samples=arguments.samples or samples,
        held_out=arguments.eval,
        model=arguments.model,
        batch_prompts=arguments.batch_prompts,
        overwrite=arguments.overwrite,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    main = os.environ.get("RANK", "0") == "0"
    with Progress(*columns, console=Console(stderr=True), disable=not main) as bar:
        task = bar.add_task("loading", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, description="prompts", completed=done, total=total)

        summary = rollout(complete(recipe, selection, plugins), selection, job, show)
    if summary is not None:
        _print(summary, job.output)
    return 0


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


def _defaults(recipe: Recipe, held_out: bool) -> tuple[int, int, Path]:
    """(prompts, samples a prompt, folder)."""
    if held_out:
        assert recipe.eval is not None
        return recipe.eval.prompts, recipe.eval.samples_per_prompt, recipe.directory / "rollouts_eval"
    return recipe.algorithm.prompts_per_step, recipe.algorithm.samples_per_prompt, recipe.directory / "rollouts"


def _count(text: str) -> int:
    """A number, or 0 for `all`."""
    return 0 if text == "all" else positive(text)
