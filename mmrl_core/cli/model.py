"""`mmrl model`: models that come as Python packages."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser("model", help="fetch a model that comes as a package", description=__doc__)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    fetch = actions.add_parser("fetch", help="fetch and convert a model, and print its folder")
    fetch.add_argument("name", metavar="NAME", help="for example smollm2-135m-instruct")
    fetch.set_defaults(func=_fetch)
    known = actions.add_parser("list", help="list the models that can be fetched")
    known.set_defaults(func=_list)


def _fetch(arguments: argparse.Namespace) -> int:
    from mmrl_core.packaged_models import PREFIX, local_path

    print(local_path(PREFIX + arguments.name.removeprefix(PREFIX)))
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from mmrl_core.packaged_models import PACKAGED_MODELS, PREFIX, model_cache

    for name, model in PACKAGED_MODELS.items():
        folder = model_cache() / name
        where = str(folder) if folder.is_dir() else "not fetched"
        print(f"{PREFIX}{name}  {model.requirement}  {model.license}  {where}")
    return 0
