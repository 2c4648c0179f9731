"""The program that every rank runs: build the components, train, and say how it ended."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import torch

from mmrl_core.checkpoint.store import CheckpointStore
from mmrl_core.contracts import TrainingSpec
from mmrl_core.errors import BackendError, MmrlError
from mmrl_core.grpo.run import Run
from mmrl_core.grpo.trainer import hand_over_weights, train
from mmrl_core.launch import components
from mmrl_core.launch.distributed import connect, disconnect
from mmrl_core.launch.ending import finish, has_ended
from mmrl_core.launch.logs import configure_logging
from mmrl_core.launch.observers import NoObservers, RunObservers
from mmrl_core.launch.preflight import installed_versions, preflight
from mmrl_core.launch.resume import resume, shaping_fields
from mmrl_core.launch.signals import StopRequest
from mmrl_core.metrics.timers import PhaseTimers
from mmrl_core.plugins import Selection, load_plugins, resolve
from mmrl_core.recipe import Recipe, load_recipe
from mmrl_core.rewards.executor import RewardExecutor
from mmrl_core.world import World

log = logging.getLogger("mmrl.train")


def main(recipe_path: Path) -> int:
    """Train as the complete recipe at `recipe_path` says. Returns the exit status; raises MmrlError."""
    recipe, source = load_recipe(recipe_path)
    selection = resolve(recipe, source)
    rank = int(os.environ.get("RANK", "0"))
    configure_logging(recipe.directory, rank)
    device = components.create_device(selection)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    with StopRequest() as stop, components.create_rewards(recipe, selection, device, local_rank) as rewards:
        world = connect(device)
        try:
            if recipe.deterministic:
                device.set_deterministic(True)
            run = build(recipe, selection, world, device, rewards)
            run.stop_requested = lambda: stop.requested(world)
            return _run(run)
        except MmrlError as error:
            log.error("%s", error, extra={"file_only": True})  # the command line prints it
            raise
        finally:
            disconnect()


def build(recipe: Recipe, selection: Selection, world: World, device: Any, rewards: RewardExecutor) -> Run:
    """Check that ranks agree, then create and set up every component. Collective."""
    source = components.create_source(selection.data, recipe.seed)
    data_digest = source.digest()
    preflight(
        world,
        recipe_digest=components.digest(recipe.model_dump(mode="json")),
        plugins_digest=selection.digest(),
        data_digest=data_digest,
        versions=installed_versions(),
        rewards=recipe.rewards,
    )
    policy = components.create_policy(selection, recipe.model)
    context = components.context(recipe, world, device)
    device.seed(recipe.seed)
    algorithm = recipe.algorithm
    backend = selection.backend.create()
    backend.setup(
        context,
        policy,
        TrainingSpec(
            optimizer=recipe.optimizer,
            total_updates=algorithm.steps * algorithm.updates_per_rollout,
            reference=algorithm.kl.coef > 0,
        ),
    )
    engine = selection.rollout.create()
    engine.setup(context, policy, backend)
    rewards.setup()
    if not engine.replica.is_root:
        rewards.close()
    return Run(
        recipe=recipe,
        world=world,
        device=device,
        policy=policy,
        backend=backend,
        engine=engine,
        rewards=rewards,
        source=source,
        sampling=selection.sampling,
        evaluator=components.create_evaluator(recipe, selection, world, policy, engine, rewards),
        observers=RunObservers(load_plugins(), selection.writers) if world.is_main else NoObservers(),
        timers=PhaseTimers(device.synchronize, mark=torch.profiler.record_function),
        store=CheckpointStore(recipe.directory, world, recipe.checkpoint.keep),
        stop_requested=lambda: False,
        facts={"recipe": shaping_fields(recipe), "data_digest": data_digest},
        estimator=components.create_estimator(recipe, selection),
        policy_gradient=components.create_policy_gradient(recipe, selection),
    )


def _run(run: Run) -> int:
    line = resume(run)
    log.info("%s", line)
    total = run.recipe.algorithm.steps
    if run.world.is_main:
        print(f"mmrl: {line}", flush=True)
    if run.progress.step >= total and has_ended(run):
        if run.world.is_main:
            print(
                f"mmrl: all {total} steps of {run.directory} are done already; nothing to do. Raise algorithm.steps "
                "to go on, or choose another run_dir",
                flush=True,
            )
        return 0
    started = time.monotonic()
    hand_over_weights(run)
    run.observers.run_start(run.recipe, run.directory, run.progress.step + 1)
    summary: dict[str, Any] = {"outcome": "failed", "run_dir": str(run.directory)}
    try:
        outcome = train(run)
        summary = finish(run, outcome)
        return 0
    except torch.OutOfMemoryError as error:
        raise BackendError(
            f"out of device memory in step {run.progress.step + 1}: {error}\nLower backend.micro_batch_groups (or set "
            "backend.micro_batch_samples to 1), turn on backend.activation_checkpointing, or sample shorter texts or "
            "smaller images (sampling)"
        ) from error
    finally:
        summary["seconds"] = time.monotonic() - started
        run.observers.run_end(summary)
        run.engine.close()
