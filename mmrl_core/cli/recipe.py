"""`mmrl recipe check|show|schema`: recipes without running them. Imports no torch."""

from __future__ import annotations

import argparse
import json

from mmrl_core.cli.recipe_schema import recipe_schema
from mmrl_core.launch.runfolder import recipe_yaml
from mmrl_core.plugins import Selection, load_plugins, resolve, warn_unusable
from mmrl_core.recipe import Recipe, load_recipe
from mmrl_core.resolved import complete, unavailable


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser("recipe", help="check, show and describe recipes", description=__doc__)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, line, function in (
        ("check", "say whether a recipe is right, and what its words stand for here", check),
        ("show", "print the complete recipe: every default, every component's options", show),
    ):
        action = actions.add_parser(name, help=line, description=line)
        action.add_argument("recipe", metavar="RECIPE", help="a YAML file")
        action.add_argument("overrides", nargs="*", metavar="key=value", help="for example algorithm.steps=10")
        action.set_defaults(func=function)
    line = "print the JSON schema of recipes for the installed components, for an editor's YAML plugin"
    actions.add_parser("schema", help=line, description=line).set_defaults(func=schema)


def check(arguments: argparse.Namespace) -> int:
    """Print `ok: ...`; raises RecipeError with every problem."""
    recipe, selection = _resolved(arguments)
    words = "  ".join(f"{s.found.kind}={s.found.distribution}:{s.found.name}" for s in selection.all())
    a = recipe.algorithm
    print(
        f"ok: {arguments.recipe}: {recipe.name}, {recipe.model.path}, {a.steps} steps of {a.prompts_per_step} x "
        f"{a.samples_per_prompt} samples, run folder {recipe.directory}\n    {words}"
    )
    for line in unavailable(selection):
        print(f"    not on this machine: {line}")
    return 0


def show(arguments: argparse.Namespace) -> int:
    """Print the YAML that `mmrl train` would run."""
    recipe, _ = _resolved(arguments)
    print(recipe_yaml(recipe), end="")
    return 0


def schema(arguments: argparse.Namespace) -> int:
    """Print the JSON schema."""
    print(json.dumps(recipe_schema(load_plugins()), indent=2))
    return 0


def _resolved(arguments: argparse.Namespace) -> tuple[Recipe, Selection]:
    recipe, source = load_recipe(arguments.recipe, arguments.overrides)
    plugins = load_plugins()
    selection = resolve(recipe, source, plugins)
    warn_unusable(plugins)
    return complete(recipe, selection, plugins), selection
