"""One batch from a combination's own rollout engine, with advantages from the recipe's rewards."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrl_core.contracts import DeviceOps, Policy, PromptSource, RolloutEngine, Rollouts, TrainingBackend
from mmrl_core.errors import VerifyError
from mmrl_core.grpo.collect import request, score_everywhere, take_prompts
from mmrl_core.grpo.trainer import advantages_of
from mmrl_core.launch import components
from mmrl_core.plugins import Selection
from mmrl_core.recipe import Recipe
from mmrl_core.rewards.executor import RewardExecutor, Scored
from mmrl_core.rows import concatenate, select_rows
from mmrl_core.verify.batch import Batch, sample_row, synthetic_advantages
from mmrl_core.verify.job import Job
from mmrl_core.world import World

_SHOWN = 200
"""Characters of a sample's text that are kept."""


@dataclass(kw_only=True)
class Stage:
    """The components of one combination on this rank, set up."""

    recipe: Recipe
    selection: Selection
    world: World
    device: DeviceOps
    policy: Policy
    backend: TrainingBackend
    source: PromptSource
    rewards: RewardExecutor


def settings(recipe: Recipe) -> dict[str, Any]:
    """What shapes an engine's rollouts beside the weights, as plain values."""
    values = recipe.model_dump(mode="json")
    return {name: values[name] for name in ("seed", "rollout", "sampling", "data")}


def generate(stage: Stage, engine: RolloutEngine, job: Job, folder: Path) -> None:
    """Sample `job.prompts` groups with the current weights, score them, and have rank 0 write the batch. Collective.

    Raises VerifyError when nothing can be learned from them, RewardError when a reward cannot be run.
    """
    recipe, world = stage.recipe, stage.world
    prompts = take_prompts(stage.source, stage.policy, job.prompts)
    size = recipe.algorithm.samples_per_prompt
    requests = [request(recipe.seed, 1, prompt, group, size) for group, prompt in enumerate(prompts)]
    shared = engine.weights == "shared"
    engine.update_weights(None if shared else stage.backend.export_weights(), 0)
    if not shared:
        stage.backend.offload()
    engine.wake()
    replica = engine.replica
    rollouts = engine.generate(requests[replica.index :: replica.count], stage.selection.sampling)
    engine.sleep()
    if not shared:
        stage.backend.onload()
    scored = [] if job.synthetic_advantages else score_everywhere(stage.rewards, engine, world, rollouts.samples)
    texts = [(sample.text or "")[:_SHOWN] for sample in rollouts.samples]
    rollouts.samples = []
    parts = world.gather_main((rollouts, texts, scored) if replica.is_root else None)
    problem: str | None = None
    if world.is_main:
        try:
            batch = _batch(stage, job, [part for part in parts if part is not None])
            batch.facts["engine"] = {"name": recipe.rollout.name, **asdict(engine.semantics)}
            batch.write(folder)
        except VerifyError as error:
            problem = str(error)
    problem = world.broadcast(problem)
    if problem is not None:
        raise VerifyError(problem)


def _batch(stage: Stage, job: Job, parts: list[tuple[Rollouts, list[str], list[Scored]]]) -> Batch:
    """All replicas' rows, ordered by sample id, without those that have no advantage."""
    recipe = stage.recipe
    rollouts = concatenate([part for part, _, _ in parts])
    texts = [text for _, some, _ in parts for text in some]
    scored = [result for _, _, results in parts for result in results]
    if recipe.algorithm.truncated == "mask":
        rollouts.mask = rollouts.mask & ~rollouts.truncated[:, None]
    order = sorted(range(len(rollouts)), key=lambda row: int(rollouts.sample_id[row]))
    if job.synthetic_advantages:
        rows = order
        picked = select_rows(rollouts, rows)
        advantages = synthetic_advantages(picked.group_id.tolist(), picked.sample_id.tolist())
    else:
        rows = _usable(recipe, rollouts, scored, order)
        picked = select_rows(rollouts, rows)
        advantages = _advantages(stage, picked, [scored[row] for row in rows])
    if not bool((picked.mask.sum(-1) * advantages.abs()).any()):
        raise VerifyError(
            "every advantage of the batch is 0 (the samples of each prompt have equal rewards), so every gradient "
            "would be 0 too. Take more --prompts, a model that is sometimes right, or --synthetic-advantages"
        )
    samples = [
        {"sample_id": int(picked.sample_id[place]), "group_id": int(picked.group_id[place]), "text": texts[row]}
        for place, row in enumerate(rows)
    ]
    facts = {
        "settings": settings(recipe),
        "advantages": "synthetic" if job.synthetic_advantages else "rewards",
        "samples": samples,
    }
    return Batch(rollouts=picked, advantages=advantages, facts=facts)


def _usable(recipe: Recipe, rollouts: Rollouts, scored: list[Scored], order: list[int]) -> list[int]:
    """Rows that have a score and are not left out as truncated, of groups that keep at least two."""
    drop = recipe.algorithm.truncated == "drop"
    lost = {int(rollouts.group_id[row]) for row in order if scored[row].drop_group}
    rows = [
        row
        for row in order
        if scored[row].value is not None
        and int(rollouts.group_id[row]) not in lost
        and not (drop and bool(rollouts.truncated[row]))
    ]
    sizes: dict[int, int] = {}
    for row in rows:
        group = int(rollouts.group_id[row])
        sizes[group] = sizes.get(group, 0) + 1
    usable = [row for row in rows if sizes[int(rollouts.group_id[row])] >= 2]
    if not usable:
        why = next((result.failure for result in scored if result.failure), "all samples were truncated")
        raise VerifyError(
            f"no group of the batch has two samples with a reward: {why}. Correct the reward, or use "
            "--synthetic-advantages"
        )
    return usable


def _advantages(stage: Stage, rollouts: Rollouts, scored: list[Scored]) -> Tensor:
    """[B] fp32, as the recipe's `algorithm.advantage` says; a KL penalty in the reward is left out."""
    kept = [
        sample_row(int(group), int(sample), int(actions), result)
        for group, sample, actions, result in zip(
            rollouts.group_id, rollouts.sample_id, rollouts.mask.sum(-1), scored, strict=True
        )
    ]
    rewards = torch.tensor([result.value for result in scored], dtype=torch.float64)
    estimator = components.create_estimator(stage.recipe, stage.selection)
    table = advantages_of(stage.recipe, estimator, kept, rewards, 1)
    return torch.tensor([table[int(sample)] for sample in rollouts.sample_id], dtype=torch.float32)
