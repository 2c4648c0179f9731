"""`mmrl rollout RECIPE`: generate, score and save samples without training."""

from __future__ import annotations

import argparse
from pathlib import Path

from mmrl_core.cli.arguments import positive
from mmrl_core.errors import RecipeError
from mmrl_core.plugins import load_plugins, resolve
from mmrl_core.recipe import Recipe, load_recipe
from mmrl_core.resolved import complete, require_available

WORKER = "mmrl_core.launch.rollout_job"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "rollout",
        help="generate, score and save samples without training",
        description="Generate samples for a recipe's prompts, score them with its rewards and save texts, images or "
        "videos with their prompts and rewards. Started again, an interrupted command goes on where it was.",
        epilog="The ranks of the recipe's launcher, or of torchrun, share the prompts; the samples are the same on any "
        "number of ranks.",
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
    """Run the job on every rank of the recipe's launcher."""
    recipe, source = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.eval and recipe.eval is None:
        raise RecipeError(f"{arguments.recipe}: `mmrl rollout --eval` needs an `eval` section (data, prompts)")
    plugins = load_plugins()
    selection = resolve(recipe, source, plugins)
    require_available(selection)
    from mmrl_core.launch.jobs import launch_job
    from mmrl_core.launch.rollout_folder import check_folder

    prompts, samples, folder = _defaults(recipe, arguments.eval)
    output: Path = arguments.output or folder
    check_folder(output)
    job = {
        "output": str(output),
        "prompts": prompts if arguments.prompts is None else (arguments.prompts or None),
        "samples": arguments.samples or samples,
        "held_out": arguments.eval,
        "model": arguments.model,
        "batch_prompts": arguments.batch_prompts,
        "overwrite": arguments.overwrite,
    }
    full = complete(recipe, selection, plugins)
    return launch_job(full, selection, output / ".job", job, WORKER, [arguments.model or recipe.model.path])


def _defaults(recipe: Recipe, held_out: bool) -> tuple[int, int, Path]:
    """(prompts, samples a prompt, folder)."""
    if held_out:
        assert recipe.eval is not None
        return recipe.eval.prompts, recipe.eval.samples_per_prompt, recipe.directory / "rollouts_eval"
    return recipe.algorithm.prompts_per_step, recipe.algorithm.samples_per_prompt, recipe.directory / "rollouts"


def _count(text: str) -> int:
    """A number, or 0 for `all`."""
    return 0 if text == "all" else positive(text)
