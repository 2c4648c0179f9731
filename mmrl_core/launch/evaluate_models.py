"""Evaluation of model folders outside training, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

from mmrl_core.grpo.evaluation import Evaluation, evaluate
from mmrl_core.grpo.run import Run
from mmrl_core.launch import components
from mmrl_core.launch.distributed import connect, disconnect
from mmrl_core.packaged_models import local_path
from mmrl_core.plugins import Selection
from mmrl_core.recipe import Recipe


def evaluate_models(recipe: Recipe, selection: Selection, models: Sequence[str]) -> list[Evaluation]:
    """Score each model on the recipe's evaluation prompts with the recipe's rewards, one model at a time.

    The rollout engine loads each folder by itself (own weights), as any reader of a Hugging Face folder would; no
    training backend is built.
    """
    assert selection.eval_data is not None
    device = components.create_device(selection)
    results = []
    with components.create_rewards(recipe, selection, device, 0) as rewards:
        world = connect(device)
        try:
            rewards.setup()
            source = components.create_source(selection.eval_data, recipe.seed)
            for path in models:
                spec = recipe.model.model_copy(update={"path": local_path(path), "lora": None})
                policy = components.create_policy(selection, spec)
                engine = selection.rollout.create()
                engine.setup(components.context(recipe, world, device), policy, None)
                run: Any = SimpleNamespace(
                    recipe=recipe,
                    world=world,
                    policy=policy,
                    engine=engine,
                    rewards=rewards,
                    eval_source=source,
                    eval_sampling=selection.eval_sampling,
                )
                results.append(evaluate(cast(Run, run)))
                engine.close()
        finally:
            disconnect()
    return results
