"""The `local` launcher: one rank in this process, or several started and watched by us."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import tempfile
from pathlib import Path

from mmrl_core.contracts import TRAINING, DeviceOps, Launcher
from mmrl_core.devices.cores import usable_cores
from mmrl_core.errors import DeviceError, PreflightError
from mmrl_core.launch.device_environment import additions, recommended
from mmrl_core.launch.failure import MARK_VARIABLE
from mmrl_core.launch.options import LocalOptions
from mmrl_core.launch.parent import PARENT_VARIABLE
from mmrl_core.launch.rank import LOG_VARIABLE
from mmrl_core.launch.runfolder import write_recipe
from mmrl_core.plugins import load_plugins
from mmrl_core.recipe import Recipe

log = logging.getLogger("mmrl.launch")

_THREADS = "OMP_NUM_THREADS"


class LocalLauncher(Launcher):
    """Ranks on this machine. They meet through a file, so no port can be taken by somebody else."""

    def __init__(self, options: LocalOptions) -> None:
        super().__init__(options)
        self._options = options

    def launch(self, recipe: Recipe, worker: str = TRAINING) -> int:
        """Write the recipe into the run folder and run the worker on every rank.

        Returns 0 when all ranks ended well, else the exit status of the rank that failed first (128 + signal when it
        was killed). Raises PreflightError when the run folder cannot be written or the environment is not ours.
        """
        path = write_recipe(recipe)
        count = self._process_count(recipe)
        wanted = self._wanted_by_the_device(recipe, count)
        if count == 1 and not wanted:
            return self._run_here(path, worker)
        if "RANK" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
            raise PreflightError(
                f"launcher local would start {count} ranks inside a process that another launcher has started (RANK="
                f"{os.environ.get('RANK')}). Use launcher: torchrun, or unset RANK and TORCHELASTIC_RUN_ID"
            )
        from mmrl_core.launch.ranks import run_ranks  # imports torch

        logs = recipe.directory / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="mmrl-") as folder:
            environments = [{**wanted, **self._environment(rank, count, Path(folder))} for rank in range(count)]
            log_files: dict[int, Path] = {rank: (logs / f"rank{rank}.log").resolve() for rank in range(1, count)}
            for rank, log in log_files.items():
                environments[rank][LOG_VARIABLE] = str(log)
            command = ("-m", "mmrl_core.launch.rank", worker, str(path.resolve()))
            return run_ranks(sys.executable, command, environments, log_files)

    def _process_count(self, recipe: Recipe) -> int:
        if self._options.processes != "auto":
            return self._options.processes
        device: DeviceOps = load_plugins().get("device", recipe.device.name).load()()
        if device.name == "cpu":
            return 1
        count = device.device_count()
        if count == 0:
            raise DeviceError(
                f"launcher local with processes: auto: device {device.name} finds none here. Set processes to a "
                "number, or see what mmrl doctor says"
            )
        return count

    def _wanted_by_the_device(self, recipe: Recipe, count: int) -> dict[str, str]:
        """Variables to start ranks with: some libraries read them when a process starts, and never again."""
        if self._options.environment == "inherit":
            return {}
        device = load_plugins().get("device", recipe.device.name)
        added = additions(recommended(device, recipe, ranks=count), os.environ)
        for name, value in added.items():
            log.info("%s=%s, as device %s recommends", name, value, device.name)
        return added

    def _run_here(self, path: Path, worker: str) -> int:
        if self._options.threads_per_process is not None:
            os.environ[_THREADS] = str(self._options.threads_per_process)
            if "torch" in sys.modules:  # it read the variable when it was imported
                import torch

                torch.set_num_threads(self._options.threads_per_process)
        status: int = importlib.import_module(worker).main(path)
        return status

    def _environment(self, rank: int, count: int, folder: Path) -> dict[str, str]:
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MMRL_STORE": str(folder / "store"),
            MARK_VARIABLE: str(folder / f"failed{rank}"),
            PARENT_VARIABLE: str(os.getpid()),
        }
        if self._options.threads_per_process is not None:
            environment[_THREADS] = str(self._options.threads_per_process)
        elif _THREADS not in os.environ:
            environment[_THREADS] = str(max(1, usable_cores() // count))
        return environment
