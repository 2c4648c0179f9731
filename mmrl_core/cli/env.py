"""`mmrl env DEVICE RECIPE`: the environment variables that a device recommends for a recipe and a number of ranks.

As lines for a shell, `eval "$(mmrl env DEVICE RECIPE)"`, or as JSON. `launcher.environment: device` sets them for the
ranks that mmrl starts itself. Imports no torch.
"""

from __future__ import annotations

import argparse

from mmrl_core.errors import RecipeError
from mmrl_core.launch.device_environment import as_json, as_shell, recommended
from mmrl_core.plugins import automatic_word, load_plugins, resolve
from mmrl_core.recipe import load_recipe


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    line = "print the environment that a device wants for a recipe"
    parser = subparsers.add_parser("env", help=line, description=__doc__)
    parser.add_argument("device", metavar="DEVICE", help="the word of a device, or auto; the recipe's own is not read")
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example backend=megatron")
    parser.add_argument("--ranks", type=int, help="ranks on each machine; by default the launcher's processes, or 1")
    parser.add_argument("--nodes", type=int, default=1, help="machines; by default 1")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the variables; nothing for a device that recommends none."""
    recipe, source = load_recipe(arguments.recipe, arguments.overrides)
    plugins = load_plugins()
    device = plugins.get("device", automatic_word("device", arguments.device, plugins))
    chosen = recipe.device.model_copy(update={"name": f"{device.distribution}:{device.name}"})
    recipe = recipe.model_copy(update={"device": chosen})
    selection = resolve(recipe, source, plugins)
    processes = getattr(selection.launcher.options, "processes", 1)
    ranks = arguments.ranks if arguments.ranks is not None else processes if isinstance(processes, int) else None
    if ranks is None:
        raise RecipeError(f"mmrl env: launcher.processes is {processes}; say how many with --ranks")
    if ranks < 1 or arguments.nodes < 1:
        raise RecipeError(f"mmrl env: --ranks {ranks} --nodes {arguments.nodes}: give positive numbers")
    variables = recommended(device, recipe, ranks=ranks, nodes=arguments.nodes)
    text = as_json(variables) if arguments.json else as_shell(variables)
    if text:
        print(text)
    return 0
