"""`mmrl eval RECIPE`: score models on the recipe's held-out prompts; with two models, compare them pairwise."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mmrl_core.errors import RecipeError
from mmrl_core.plugins import load_plugins, resolve
from mmrl_core.recipe import Recipe, load_recipe
from mmrl_core.resolved import require_available


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "eval",
        help="score models on held-out prompts, and compare them",
        description=__doc__,
        epilog="Without --model: the recipe's model before, and the run's export after training.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file with an `eval` section")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example eval.prompts=500")
    parser.add_argument(
        "--model", action="append", metavar="PATH", help="a model folder; give it twice to compare: before, then after"
    )
    parser.add_argument("--output", metavar="FILE", help="write every prompt's scores and texts as JSON")
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the scores, and the paired test between the first two models."""
    recipe, source = load_recipe(arguments.recipe, arguments.overrides)
    if recipe.eval is None:
        raise RecipeError(f"{arguments.recipe}: `mmrl eval` needs an `eval` section (data, prompts); see the docs")
    plugins = load_plugins()
    selection = resolve(recipe, source, plugins)
    require_available(selection)
    models = arguments.model or _before_and_after(recipe)
    from mmrl_core.grpo.evaluation import paired_test
    from mmrl_core.launch.evaluate_models import evaluate_models

    results = evaluate_models(recipe, selection, models)
    width = max(len(m) for m in models)
    for model, result in zip(models, results, strict=True):
        rewards = "  ".join(f"{name} {value:.4f}" for name, value in result.rewards.items())
        of_which = f"  ({rewards})" if len(result.rewards) > 1 else ""
        print(f"{model:<{width}}  score {result.mean:.4f}  on {len(result.scores)} held-out prompts{of_which}")
    report: dict[str, Any] = {
        "models": [
            {"model": m, **r.summary(), "scores": r.scores, "texts": r.texts}
            for m, r in zip(models, results, strict=True)
        ],
        "questions": results[0].questions,
    }
    if len(results) >= 2:
        test = paired_test(results[0].scores, results[1].scores)
        difference = results[1].mean - results[0].mean
        print(
            f"paired: {difference:+.4f}  {test.better} prompts better, {test.worse} worse, {test.ties} equal; "
            f"two-sided sign test p = {test.p_value:.2g}"
        )
        report["paired"] = {
            "difference": difference,
            "better": test.better,
            "worse": test.worse,
            "ties": test.ties,
            "p_value": test.p_value,
        }
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def _before_and_after(recipe: Recipe) -> list[str]:
    export = recipe.directory / "export"
    if not (export / "config.json").is_file():
        raise RecipeError(
            f"{export}: no exported model to compare with. Run `mmrl train` first, or name models with --model"
        )
    return [recipe.model.path, str(export)]
