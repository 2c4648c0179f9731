"""Evaluation of model folders outside training: what every rank of `mmrl eval` runs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmrl_core.grpo.evaluation import Evaluation, paired_test
from mmrl_core.launch import components
from mmrl_core.launch.distributed import connect, disconnect
from mmrl_core.launch.jobs import is_first_rank, read_job
from mmrl_core.launch.preflight import installed_versions, preflight
from mmrl_core.packaged_models import local_path
from mmrl_core.plugins import Selection
from mmrl_core.recipe import Recipe


def main(recipe_path: Path) -> int:
    """Run the job beside the recipe."""
    run(*read_job(recipe_path))
    return 0


def run(recipe: Recipe, selection: Selection, job: Mapping[str, Any]) -> None:
    """Evaluate the job's models; rank 0 prints the scores and the paired test between the first two."""
    models = job["models"]
    results = evaluate_models(recipe, selection, models)
    if is_first_rank():
        _report(models, results, job["output"])


def evaluate_models(recipe: Recipe, selection: Selection, models: Sequence[str]) -> list[Evaluation]:
    """Score each model on the recipe's evaluation prompts with the recipe's rewards, one model at a time. Collective.

    The rollout engine loads each folder by itself (own weights), as any reader of a Hugging Face folder would; no
    training backend is built.
    """
    assert selection.eval_data is not None, "the caller checked that there is an eval section"
    device = components.create_device(selection)
    results = []
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    with components.create_rewards(recipe, selection, device, local_rank) as rewards:
        world = connect(device)
        try:
            preflight(
                world,
                recipe_digest=components.digest([recipe.model_dump(mode="json"), list(models)]),
                plugins_digest=selection.digest(),
                data_digest=components.create_source(selection.eval_data, recipe.seed).digest(),
                versions=installed_versions(),
                rewards=recipe.rewards,
            )
            rewards.setup()
            for path in models:
                own = path == recipe.model.path  # other folders have their weights in them
                changes = {"path": local_path(path), "lora": None, "init_from": recipe.model.init_from if own else None}
                spec = recipe.model.model_copy(update=changes)
                policy = components.create_policy(selection, spec)
                engine = selection.rollout.create()
                engine.setup(components.context(recipe, world, device), policy, None)
                if not engine.replica.is_root:
                    rewards.close()
                evaluator = components.create_evaluator(recipe, selection, world, policy, engine, rewards)
                assert evaluator is not None
                results.append(evaluator.evaluate())
                engine.close()
        finally:
            disconnect()
    return results


def _report(models: Sequence[str], results: Sequence[Evaluation], output: str | None) -> None:
    """Print what was found, and write it to `output`."""
    width = max(len(m) for m in models)
    for model, result in zip(models, results, strict=True):
        rewards = "  ".join(f"{name} {value:.4f}" for name, value in result.rewards.items())
        of_which = f"  ({rewards})" if len(result.rewards) > 1 else ""
        print(f"{model:<{width}}  score {result.mean:.4f}  on {len(result.scores)} held-out prompts{of_which}")
    report: dict[str, Any] = {
        "models": [
            {"model": m, **r.summary(), "scores": r.scores, "texts": r.texts}
            for m, r in zip(models, results, strict=True)
        ],
        "questions": results[0].questions,
    }
    if len(results) >= 2:
        test = paired_test(results[0].scores, results[1].scores)
        difference = results[1].mean - results[0].mean
        print(
            f"paired: {difference:+.4f}  {test.better} prompts better, {test.worse} worse, {test.ties} equal; "
            f"two-sided sign test p = {test.p_value:.2g}"
        )
        report["paired"] = {
            "difference": difference,
            "better": test.better,
            "worse": test.worse,
            "ties": test.ties,
            "p_value": test.p_value,
        }
    if output:
        Path(output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
