"""Loading a checkpoint into its backend, in this process, to write a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from mmrl_core.checkpoint.store import Checkpoint, CheckpointStore
from mmrl_core.contracts import TrainingSpec
from mmrl_core.errors import CheckpointError
from mmrl_core.launch import components
from mmrl_core.launch.distributed import connect, disconnect
from mmrl_core.plugins import resolve
from mmrl_core.recipe import load_recipe


def export_checkpoint(recipe_file: Path, run_dir: Path, output: Path, step: int | None) -> int:
    """Write `output` from the checkpoint of `step`, or the newest valid one; returns its step.

    Works in one process whatever the number of ranks that wrote it. Raises CheckpointError.
    """
    recipe, source = load_recipe(recipe_file)
    selection = resolve(recipe, source)
    device = components.create_device(selection)
    world = connect(device)
    try:
        store = CheckpointStore(run_dir, world, keep=1)
        if step is None:
            checkpoint = store.newest()
        else:
            checkpoint = Checkpoint.open(store.folder / f"step_{step:08d}")
        if checkpoint is None:
            raise CheckpointError(f"{store.folder}: no valid checkpoint")
        policy = components.create_policy(selection, recipe.model)
        backend = selection.backend.create()
        training = TrainingSpec(optimizer=recipe.optimizer, total_updates=1, reference=False)
        backend.setup(components.context(recipe, world, device), policy, training)
        backend.load(checkpoint.backend, optimizer=False)
        policy.save_weights(output, backend.export_weights())
        return checkpoint.step
    finally:
        disconnect()
