"""Continuing a run from its newest valid checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from mmrl_core.checkpoint.store import Checkpoint
from mmrl_core.errors import CheckpointError
from mmrl_core.grpo.run import Progress, Run
from mmrl_core.recipe import Recipe

log = logging.getLogger("mmrl.train")

SHAPING = ("seed", "deterministic", "model", "rollout", "sampling", "data", "rewards", "algorithm", "optimizer")
"""Sections of a recipe that shape the result; others may change between sessions. So may `algorithm.steps`."""


def shaping_fields(recipe: Recipe) -> dict[str, Any]:
    """What a resumed run must share with its checkpoint, as plain values."""
    fields = {name: value for name, value in recipe.model_dump(mode="json").items() if name in SHAPING}
    fields["algorithm"].pop("steps")
    return fields


def resume(run: Run) -> str:
    """Restore the newest valid checkpoint, if the recipe wants it. Returns one line that says what was done.

    Collective. Raises CheckpointError when there is none although one is required, or when it belongs to a recipe
    that shapes the result differently.
    """
    spec = run.recipe.checkpoint
    checkpoint = run.store.newest()
    if spec.resume == "never" and checkpoint is not None:
        raise CheckpointError(
            f"{run.directory} holds a checkpoint of step {checkpoint.step}, but checkpoint.resume is `never`. Choose "
            "another run_dir, or remove the folder"
        )
    if checkpoint is None:
        if spec.resume == "required":
            raise CheckpointError(
                f"{run.directory}: no valid checkpoint, but checkpoint.resume is `required`. Set it to auto, or name "
                "the right run_dir"
            )
        return "starting from step 1"
    _check_same_recipe(run, checkpoint)
    run.backend.load(checkpoint.backend, optimizer=spec.load_optimizer)
    run.progress = Progress(**checkpoint.state["progress"])
    if spec.load_rng and run.world.rank < checkpoint.world_size:
        tensors = checkpoint.tensors(run.world.rank)
        run.device.set_rng_state(tensors["device_rng"])
        torch.set_rng_state(tensors["cpu_rng"])
    fresh = "" if spec.load_optimizer else ", with a fresh optimizer"
    return f"resuming after step {checkpoint.step} from {checkpoint.path}{fresh}"


def _check_same_recipe(run: Run, checkpoint: Checkpoint) -> None:
    recipe = run.recipe
    changed = differences(checkpoint.state["recipe"], run.facts["recipe"], "")
    if not changed and checkpoint.state["data_digest"] != run.facts["data_digest"]:
        changed = [("the data's content", checkpoint.state["data_digest"], run.facts["data_digest"])]
    if not changed:
        return
    lines = "\n".join(f"  {field}: {old!r} -> {new!r}" for field, old, new in changed)
    if recipe.checkpoint.allow_recipe_change:
        log.warning("resuming with a changed recipe (checkpoint.allow_recipe_change):\n%s", lines)
        return
    raise CheckpointError(
        f"{checkpoint.path} was written by a recipe that differs in what shapes the result:\n{lines}\n"
        "Use another run_dir, restore these fields, or accept with checkpoint.allow_recipe_change: true"
    )


def differences(before: Any, now: Any, at: str) -> list[tuple[str, Any, Any]]:
    """(dotted name, before, now) of the values in nested mappings that are not the same, below `at`."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        rows = []
        for key in sorted(set(before) | set(now)):
            rows += differences(before.get(key), now.get(key), f"{at}.{key}" if at else str(key))
        return rows
    return [] if before == now else [(at, before, now)]
