"""`mmrl train RECIPE`: check the recipe, then run it on every rank."""

from __future__ import annotations

import argparse

from mmrl_core.packaged_models import local_path
from mmrl_core.plugins import load_plugins, resolve, warn_unusable
from mmrl_core.recipe import load_recipe
from mmrl_core.resolved import complete, require_available


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser("train", help="train a model as a recipe says", description=__doc__)
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example algorithm.steps=10")
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Exit status of the run; 0 when every rank ended well."""
    recipe, source = load_recipe(arguments.recipe, arguments.overrides)
    plugins = load_plugins()
    selection = resolve(recipe, source, plugins)
    warn_unusable(plugins)
    require_available(selection)
    full = complete(recipe, selection, plugins)
    model = full.model.model_copy(update={"path": local_path(full.model.path)})
    status: int = selection.launcher.create().launch(full.model_copy(update={"model": model}))
    return status
