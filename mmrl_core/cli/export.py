"""`mmrl export RUN_DIR OUTPUT`: an ordinary Hugging Face folder from the newest valid checkpoint of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from mmrl_core.errors import CheckpointError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "export", help="turn a checkpoint into an ordinary Hugging Face folder", description=__doc__
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the run's folder")
    parser.add_argument("output", metavar="OUTPUT", help="the folder to write")
    parser.add_argument("--step", type=int, help="the checkpoint's step; the newest valid one when not given")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Print where the folder is."""
    output = Path(arguments.output)
    recipe_file = Path(arguments.run_dir) / "recipe.yaml"
    if not recipe_file.is_file():
        raise CheckpointError(f"{arguments.run_dir}: no recipe.yaml; name the folder of a run (see run_dir)")
    if output.exists() and not arguments.overwrite:
        raise CheckpointError(f"{output} exists; choose another folder or pass --overwrite")
    from mmrl_core.launch.export_checkpoint import export_checkpoint

    step = export_checkpoint(recipe_file, Path(arguments.run_dir), output, arguments.step)
    print(f"{output}: step {step} of {arguments.run_dir}")
    return 0
