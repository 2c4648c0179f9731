"""The launcher `ray`. Ray is imported only once a cluster has answered."""

from __future__ import annotations

import os

from mmrl_core.contracts import TRAINING, Launcher
from mmrl_core.errors import PreflightError
from mmrl_core.launch.runfolder import write_recipe
from mmrl_core.recipe import Recipe
from mmrl_ray.address import reach
from mmrl_ray.options import RayOptions


class RayLauncher(Launcher):
    """Ranks on the nodes of a Ray cluster, one for each device."""

    def __init__(self, options: RayOptions) -> None:
        super().__init__(options)
        self._options = options

    def launch(self, recipe: Recipe, worker: str = TRAINING) -> int:
        """Write the recipe into the run folder and run the worker on every rank.

        Returns 0 when all ranks ended well, else the exit status of the rank that failed first (128 + signal when it
        was killed, 137 when its node was lost). Raises PreflightError when there is no cluster, it has too few devices,
        or its nodes are not alike.
        """
        if "RANK" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
            raise PreflightError(
                "launcher ray would start ranks inside a process that another launcher has started (RANK="
                f"{os.environ.get('RANK')}). Use launcher: torchrun, or unset RANK and TORCHELASTIC_RUN_ID"
            )
        address = reach(self._options.address)
        write_recipe(recipe)
        from mmrl_ray.job import Job

        return Job(recipe, worker, self._options).run(address)
