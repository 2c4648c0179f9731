"""`mmrl eval RECIPE`: score models on the recipe's held-out prompts; with two models, compare them pairwise."""

from __future__ import annotations

import argparse

from mmrl_core.errors import RecipeError
from mmrl_core.plugins import load_plugins, resolve
from mmrl_core.recipe import Recipe, load_recipe
from mmrl_core.resolved import complete, require_available

WORKER = "mmrl_core.launch.evaluate_models"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "eval",
        help="score models on held-out prompts, and compare them",
        description=__doc__,
        epilog="Without --model: the recipe's model before, and the run's export after training. The ranks of the "
        "recipe's launcher, or of torchrun, share the prompts.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file with an `eval` section")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example eval.prompts=500")
    parser.add_argument(
        "--model", action="append", metavar="PATH", help="a model folder; give it twice to compare: before, then after"
    )
    parser.add_argument("--output", metavar="FILE", help="write every prompt's scores and texts as JSON")
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the job on every rank of the recipe's launcher."""
    recipe, source = load_recipe(arguments.recipe, arguments.overrides)
    if recipe.eval is None:
        raise RecipeError(f"{arguments.recipe}: `mmrl eval` needs an `eval` section (data, prompts); see the docs")
    plugins = load_plugins()
    selection = resolve(recipe, source, plugins)
    require_available(selection)
    models = arguments.model or _before_and_after(recipe)
    from mmrl_core.launch.jobs import launch_job

    job = {"models": models, "output": arguments.output}
    full = complete(recipe, selection, plugins)
    return launch_job(full, selection, recipe.directory / ".eval", job, WORKER, models)


def _before_and_after(recipe: Recipe) -> list[str]:
    export = recipe.directory / "export"
    if not (export / "config.json").is_file():
        raise RecipeError(
            f"{export}: no exported model to compare with. Run `mmrl train` first, or name models with --model"
        )
    return [recipe.model.path, str(export)]
