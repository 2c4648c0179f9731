"""Evaluation of model folders outside training, in this process."""

from __future__ import annotations

from collections.abc import Sequence

from mmrl_core.grpo.evaluation import Evaluation
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
    device = components.create_device(selection)
    results = []
    with components.create_rewards(recipe, selection, device, 0) as rewards:
        world = connect(device)
        try:
            rewards.setup()
            for path in models:
                own = path == recipe.model.path  # other folders have their weights in them
                changes = {"path": local_path(path), "lora": None, "init_from": recipe.model.init_from if own else None}
                spec = recipe.model.model_copy(update=changes)
                policy = components.create_policy(selection, spec)
                engine = selection.rollout.create()
                engine.setup(components.context(recipe, world, device), policy, None)
                evaluator = components.create_evaluator(recipe, selection, world, policy, engine, rewards)
                assert evaluator is not None, "the caller checked that there is an eval section"
                results.append(evaluator.evaluate())
                engine.close()
        finally:
            disconnect()
    return results
