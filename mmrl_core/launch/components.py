"""From a resolved recipe to the components of this rank, set up: shared by training and evaluation."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from mmrl_core.contracts import (
    AdvantageEstimator,
    DeviceOps,
    Policy,
    PolicyGradient,
    PromptSource,
    RolloutEngine,
    RunContext,
)
from mmrl_core.grpo.evaluation import Evaluator
from mmrl_core.plugins import Selected, Selection
from mmrl_core.recipe import ModelSpec, Recipe
from mmrl_core.rewards.executor import RewardExecutor
from mmrl_core.world import World


def create_device(selection: Selection) -> DeviceOps:
    """The recipe's device, not yet activated."""
    device: DeviceOps = selection.device.create()
    return device


def create_policy(selection: Selection, model: ModelSpec) -> Policy:
    """The policy for `model`, with its tokenizer loaded."""
    policy: Policy = selection.policy.create(model, selection.sampling)
    policy.prepare()
    return policy


def create_source(selected: Selected, seed: int) -> PromptSource:
    """A prompt source, opened and checked."""
    source: PromptSource = selected.create(seed)
    source.prepare()
    return source


def create_estimator(recipe: Recipe, selection: Selection) -> AdvantageEstimator | None:
    """The plugin's advantage estimator that the recipe names, or None."""
    if selection.advantage is None:
        return None
    estimator: AdvantageEstimator = selection.advantage.create(recipe.algorithm.advantage)
    return estimator


def create_policy_gradient(recipe: Recipe, selection: Selection) -> PolicyGradient | None:
    """The plugin's policy-gradient term that the recipe names, or None."""
    if selection.policy_loss is None:
        return None
    term: PolicyGradient = selection.policy_loss.create(recipe.algorithm.loss)
    return term


def create_rewards(recipe: Recipe, selection: Selection, device: DeviceOps, local_rank: int) -> RewardExecutor:
    """The executor, not yet started. Must be started before any communication is set up."""
    own = device.name if device.name == "cpu" else f"{device.name}:{local_rank}"
    return RewardExecutor(recipe.rewards, selection.rewards, own)


def create_evaluator(
    recipe: Recipe, selection: Selection, world: World, policy: Policy, engine: RolloutEngine, rewards: RewardExecutor
) -> Evaluator | None:
    """The recipe's held-out evaluation on these components; None without an `eval` section."""
    if recipe.eval is None:
        return None
    assert selection.eval_data is not None
    return Evaluator(
        spec=recipe.eval,
        seed=recipe.seed,
        world=world,
        policy=policy,
        engine=engine,
        rewards=rewards,
        source=create_source(selection.eval_data, recipe.seed),
        sampling=selection.eval_sampling,
    )


def context(recipe: Recipe, world: World, device: DeviceOps) -> RunContext:
    """What components are given at set-up."""
    return RunContext(
        world=world,
        device=device,
        seed=recipe.seed,
        deterministic=recipe.deterministic,
        run_dir=recipe.directory,
    )


def digest(value: Any) -> str:
    """Of plain JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
