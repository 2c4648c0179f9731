"""The `torchrun` launcher: torchrun has started this process as one rank among others."""

from __future__ import annotations

import importlib
import os
import tempfile
from pathlib import Path

from mmrl_core.contracts import TRAINING, Launcher
from mmrl_core.errors import PreflightError
from mmrl_core.launch.options import TorchrunOptions
from mmrl_core.launch.runfolder import RECIPE_FILE, write_recipe, write_recipe_to
from mmrl_core.recipe import Recipe

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_COMMAND = "torchrun --nproc-per-node=RANKS_PER_NODE --no-python mmrl train RECIPE"


class TorchrunLauncher(Launcher):
    """Runs this rank in this process."""

    def __init__(self, options: TorchrunOptions) -> None:
        super().__init__(options)

    def launch(self, recipe: Recipe, worker: str = TRAINING) -> int:
        """Run the worker here. Raises PreflightError when torchrun's variables are missing or unusable.

        Rank 0 writes the run folder's recipe. The other ranks keep their copy to themselves: a recipe that differs
        between ranks must be noticed, not overwritten.
        """
        rank = check_environment()
        if rank == 0:
            return _run(write_recipe(recipe), worker)
        with tempfile.TemporaryDirectory(prefix=f"mmrl-rank{rank}-") as folder:
            path = Path(folder) / RECIPE_FILE
            write_recipe_to(recipe, path)
            return _run(path, worker)


def _run(path: Path, worker: str) -> int:
    status: int = importlib.import_module(worker).main(path)
    return status


def check_environment() -> int:
    """This process's rank, from torchrun's variables. Raises PreflightError saying what is missing or wrong."""
    missing = [name for name in _VARIABLES if not os.environ.get(name)]
    if missing:
        raise PreflightError(
            f"launcher torchrun: {', '.join(missing)} not set: this process was not started by torchrun. "
            f"Start it with\n  {_COMMAND}\nor use launcher: local"
        )
    numbers: dict[str, int] = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        text = os.environ[name]
        if not text.isdigit():
            raise PreflightError(f"launcher torchrun: {name}={text!r} is not a number. Start it with\n  {_COMMAND}")
        numbers[name] = int(text)
    for name in ("RANK", "LOCAL_RANK"):
        if numbers[name] >= numbers["WORLD_SIZE"]:
            raise PreflightError(
                f"launcher torchrun: {name}={numbers[name]} but WORLD_SIZE={numbers['WORLD_SIZE']}: ranks count from "
                f"0. Start it with\n  {_COMMAND}"
            )
    return numbers["RANK"]
