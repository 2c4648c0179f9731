"""The one loop: GRPO on any backend, engine, reward and modality.

    prompts -> generate (G per prompt) -> score -> [old log-probs] -> [reference] -> advantages
            -> minibatches x epochs: update -> new weights to the rollout engine -> metrics, evaluation, checkpoint

Every function below is called on every rank, in the same order; decisions are taken from values that all ranks hold.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from mmrl_core.contracts import AdvantageEstimator, Record, Rollouts
from mmrl_core.errors import RewardError
from mmrl_core.grpo.advantages import (
    combined_advantages,
    compute_advantages,
    estimated_advantages,
    shuffle_within_groups,
)
from mmrl_core.grpo.collect import SampleRow, StepBatch, collect, reward_columns, seed_of
from mmrl_core.grpo.distribute import Layouts, distribute
from mmrl_core.grpo.evaluation import Evaluation, Evaluator
from mmrl_core.grpo.kl import kl_estimate
from mmrl_core.grpo.losses import build_loss
from mmrl_core.grpo.minibatches import build_minibatch, split_samples
from mmrl_core.grpo.run import Run
from mmrl_core.grpo.step_metrics import step_metrics
from mmrl_core.metrics.names import check_known
from mmrl_core.recipe import Recipe
from mmrl_core.rows import stack_rows

log = logging.getLogger("mmrl.train")

PROFILES = "profile"
"""Folder of profiles in the run folder."""
MAX_IDLE_STEPS = 3
"""Steps in a row without a single usable group after which the run stops: nothing is being learned."""


def train(run: Run) -> str:
    """Run the remaining steps. Returns the outcome: "finished" or "stopped"."""
    layouts = Layouts.gather(run.world, run.engine.replica, run.backend.replica)
    schedule, total = run.recipe.checkpoint, run.recipe.algorithm.steps
    evaluator = run.evaluator
    if evaluator is not None and evaluator.spec.every and evaluator.spec.first and run.progress.step == 0:
        run.progress.first_evaluation = evaluate(run, evaluator).summary()
    while run.progress.step < total:
        step = run.progress.step + 1
        started = time.perf_counter()
        with profiled(run, step):
            learned, batch = train_step(run, step, layouts)
        run.progress.step = step
        run.progress.seconds += time.perf_counter() - started
        if evaluator is not None and evaluator.spec.every and step % evaluator.spec.every == 0:
            with run.timers("eval"):
                learned |= evaluate(run, evaluator).metrics()
        metrics = step_metrics(run, batch, learned, run.timers.collect())
        # before the checkpoint: a resumed run cuts rows after its step, but cannot bring back one that is missing
        run.observers.step_end(step, metrics, batch.samples)
        stopping = run.stop_requested()
        due = schedule.every and step % schedule.every == 0
        if stopping or due or step == total:
            with run.timers("checkpoint"):
                save(run)
        if stopping and step < total:
            log.warning("told to stop: saved step %d and leaving", step)
            return "stopped"
    return "finished"


def evaluate(run: Run, evaluator: Evaluator) -> Evaluation:
    """Score held-out prompts with the weights of the last step done, and tell the observers. Collective."""
    result = evaluator.evaluate()
    run.held_out = (run.progress.step, result)
    metrics = result.metrics()
    check_known(metrics)
    run.observers.evaluation_end(run.progress.step, metrics, result.samples)
    return result


def profiled(run: Run, step: int) -> AbstractContextManager[None]:
    """Records the block where the recipe asks for a profile of this step on this rank."""
    spec = run.recipe.profile
    if spec is None or step not in spec.steps or run.world.rank not in spec.ranks:
        return nullcontext()
    name = f"step_{step:08d}_rank{run.world.rank}"
    log.info("profile of step %d: %s", step, run.directory / PROFILES / name)
    return run.device.profile(run.directory / PROFILES, name)


def train_step(run: Run, step: int, layouts: Layouts) -> tuple[dict[str, float], StepBatch]:
    """One rollout and its updates. Returns the updates' metrics and what was sampled."""
    run.device.reset_peak_memory()
    with run.timers("all"):
        batch = collect(run, step)
        with run.timers("resharding_to_train"):
            run.engine.sleep()
            run.backend.onload()
        learned = learn(run, batch, step, layouts) if batch.learnable else nothing_to_learn(run, batch)
        with run.timers("resharding_to_infer"):
            hand_over_weights(run)
    scores = [row.score for row in batch.table if row.score is not None]
    run.progress.rewards.append(sum(scores) / len(scores) if scores else float("nan"))
    return learned, batch


def learn(run: Run, batch: StepBatch, step: int, layouts: Layouts) -> dict[str, float]:
    """Advantages and the updates of one step. Returns the updates' metrics, averaged over them."""
    algorithm = run.recipe.algorithm
    holders = {row.group_id: row.holder for row in batch.kept}
    rollouts = distribute(batch.rollouts, holders, layouts, run.world)
    old, reference = recorded_passes(run, rollouts)
    with run.timers("adv"):
        rewards = shaped_rewards(run, batch.kept, rollouts, old, reference)
        advantages = advantage_table(run, batch.kept, rewards, step)
    if algorithm.old_log_probs == "behaviour":
        old = rollouts.behaviour_log_probs
    elif algorithm.old_log_probs == "auto" and algorithm.updates_per_rollout == 1:
        old = None  # the current log-probs, detached: the same numbers without a pass
    loss = build_loss(algorithm, run.policy_gradient)
    totals: dict[str, float] = {}
    minibatches = split_samples(batch.kept, algorithm)
    with run.timers("update"):
        for _ in range(algorithm.epochs):
            for samples in minibatches:
                minibatch = build_minibatch(
                    rollouts,
                    samples,
                    batch.kept,
                    advantages,
                    algorithm,
                    max_actions=run.policy.max_actions,
                    old_log_probs=old,
                    reference=reference if algorithm.kl.where == "loss" else None,
                )
                for name, value in run.backend.update(minibatch, loss).items():
                    totals[name] = totals.get(name, 0.0) + value
                run.progress.updates += 1
    updates = algorithm.epochs * len(minibatches)
    metrics = {name: value / updates for name, value in totals.items()}
    metrics["actor/skipped_updates"] = totals["actor/skipped_updates"]
    spread = list(advantages.values())
    metrics["grpo/advantages/mean"] = sum(spread) / len(spread)
    metrics["grpo/advantages/max"], metrics["grpo/advantages/min"] = max(spread), min(spread)
    metrics["grpo/rewards/mean"] = float(rewards.mean())
    metrics["grpo/rewards/max"], metrics["grpo/rewards/min"] = float(rewards.max()), float(rewards.min())
    run.progress.idle_steps = 0
    return metrics


def recorded_passes(run: Run, rollouts: Rollouts) -> tuple[Tensor | None, Record | None]:
    """Old log-probs and the reference's record, where the recipe needs them. Work not needed is not done."""
    algorithm = run.recipe.algorithm
    kl_in_reward = algorithm.kl.coef > 0 and algorithm.kl.where == "reward"
    several = algorithm.old_log_probs == "auto" and algorithm.updates_per_rollout > 1
    old: Tensor | None = None
    reference: Record | None = None
    if several or algorithm.old_log_probs == "recompute" or kl_in_reward:
        with run.timers("old_log_p"):
            old = run.backend.replay(rollouts).log_probs
    if algorithm.kl.coef > 0:
        with run.timers("reference_model"):
            reference = run.backend.reference(rollouts)
    return old, reference


def shaped_rewards(
    run: Run, kept: Sequence[SampleRow], rollouts: Rollouts, old: Tensor | None, reference: Record | None
) -> Tensor:
    """[N] float64, in the order of `kept`: scores, less the KL penalty when it is part of the reward."""
    rewards = torch.tensor([row.score for row in kept], dtype=torch.float64)
    kl = run.recipe.algorithm.kl
    if kl.coef == 0 or kl.where != "reward":
        return rewards
    assert old is not None
    assert reference is not None
    if "log_probs" not in reference:
        raise RewardError("algorithm.kl.where: reward needs a policy whose reference record has log_probs; use loss")
    frozen = stack_rows(reference["log_probs"], rollouts.mask.shape[1])
    per_sample = (kl_estimate(old, frozen, kl.estimator) * rollouts.mask).sum(-1).tolist()
    local = dict(zip(rollouts.sample_id.tolist(), per_sample, strict=True)) if run.backend.replica.is_root else {}
    penalties = {sample: value for part in run.world.gather(local) for sample, value in part.items()}
    return rewards - kl.coef * torch.tensor([penalties[row.sample_id] for row in kept], dtype=torch.float64)


def advantage_table(run: Run, kept: Sequence[SampleRow], rewards: Tensor, step: int) -> dict[int, float]:
    """Advantage by sample id, over the whole step; the same on every rank.

    `rewards` [N] are the shaped ones, in the order of `kept`. With `combine: advantages` those of the table are used,
    each by itself.
    """
    return advantages_of(run.recipe, run.estimator, kept, rewards, step)


def advantages_of(
    recipe: Recipe, estimator: AdvantageEstimator | None, kept: Sequence[SampleRow], rewards: Tensor, step: int
) -> dict[int, float]:
    """`advantage_table` without a run."""
    algorithm = recipe.algorithm
    groups = torch.tensor([row.group_id for row in kept])
    valid = torch.ones(len(kept), dtype=torch.bool)
    separately = algorithm.advantage.combine == "advantages"
    if separately:
        rewards = reward_columns(kept, recipe.rewards)
    if algorithm.shuffle_rewards:
        rewards = shuffle_within_groups(rewards, groups, valid, seed_of(recipe.seed, step, -1))
    weights = [choice.weight for choice in recipe.rewards]
    if estimator is not None:
        lengths = torch.tensor([row.actions for row in kept])
        columns = rewards if separately else rewards[:, None]
        advantages = estimated_advantages(
            estimator, columns, weights if separately else [1.0], groups, lengths, algorithm.advantage
        )
    elif separately:
        advantages = combined_advantages(rewards, weights, groups, valid, algorithm.advantage)
    else:
        advantages = compute_advantages(rewards, groups, valid, algorithm.advantage)
    return dict(zip((row.sample_id for row in kept), advantages.tolist(), strict=True))


def nothing_to_learn(run: Run, batch: StepBatch) -> dict[str, float]:
    """A step whose every group was dropped: counted and said; an error when it keeps happening."""
    run.progress.idle_steps += 1
    failed = sum(row.score is None for row in batch.table)
    why = f"{failed} of {len(batch.table)} samples failed their reward"
    if batch.dropped_equal:
        why += f", and {batch.dropped_equal} groups had equal rewards (dynamic sampling)"
    log.warning("step %d has no group to learn from: %s", run.progress.step + 1, why)
    if run.progress.idle_steps >= MAX_IDLE_STEPS:
        raise RewardError(
            f"{MAX_IDLE_STEPS} steps in a row had no group to learn from; in the last one {why}. "
            f"Reasons of failures are in {run.directory}/run.log"
        )
    return {"actor/skipped_updates": 0.0}


def hand_over_weights(run: Run) -> None:
    """Give the rollout engine the weights it samples with next."""
    shared = run.engine.weights == "shared"
    run.engine.update_weights(None if shared else run.backend.export_weights(), run.progress.updates)
    if not shared:
        run.backend.offload()
    run.engine.wake()


def save(run: Run) -> None:
    """Write a checkpoint of the current step. Collective."""
    spec = run.recipe.checkpoint
    state: dict[str, Any] = {"progress": asdict(run.progress), **run.facts}
    run.store.save(
        run.progress.step,
        lambda directory: run.backend.save(directory, optimizer=spec.save_optimizer),
        state,
        tensors={"device_rng": run.device.rng_state(), "cpu_rng": torch.get_rng_state()},
    )
