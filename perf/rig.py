"""A real run, built as `mmrl train` builds it on one rank, for measuring its parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmrl_core.contracts import GenerationRequest
from mmrl_core.grpo.collect import draw, request
from mmrl_core.grpo.run import Run
from mmrl_core.grpo.trainer import hand_over_weights
from mmrl_core.launch import components
from mmrl_core.launch.distributed import connect, disconnect
from mmrl_core.launch.worker import build
from mmrl_core.plugins import Selection, resolve
from mmrl_core.recipe import load_recipe
from mmrl_core.testing.tiny import write_recipe_file


def text_recipe(model: str, folder: Path, /, **sections: Any) -> dict[str, Any]:
    """The combination cpu + fsdp2 + hf + numeric + causal_lm: 4 prompts x 8 samples, every response of full length.

    `sections` replace whole sections of the recipe.
    """
    return {
        "name": "perf",
        "run_dir": str(folder / "run"),
        "device": "cpu",
        "launcher": "local",
        "model": {"path": model, "dtype": "float32"},
        "backend": {"name": "fsdp2", "micro_batch_groups": 4},
        "rollout": {"name": "hf", "weights": "shared"},
        "sampling": {"max_new_tokens": 16, "temperature": 1.0, "ignore_eos": True},
        "data": {"name": "arithmetic", "operations": ["+"], "largest": 39},
        "rewards": [{"name": "numeric", "correct_weight": 0.5, "format_weight": 0.5, "run": "inline"}],
        "algorithm": {"steps": 100_000, "prompts_per_step": 4, "samples_per_prompt": 8},
        "optimizer": {"lr": 5e-6, "schedule": "constant"},
        "writers": [],
        **sections,
    }


@contextmanager
def selected(values: Mapping[str, Any], folder: Path) -> Iterator[tuple[Run, Selection]]:
    """The run that a recipe of these values describes, ready for its first step, and what was selected for it."""
    recipe, source = load_recipe(write_recipe_file(folder / "recipe.json", values))
    selection = resolve(recipe, source)
    device = components.create_device(selection)
    with components.create_rewards(recipe, selection, device, 0) as rewards:
        world = connect(device)
        try:
            run = build(recipe, selection, world, device, rewards)
            try:
                hand_over_weights(run)
                yield run, selection
            finally:
                run.engine.close()
        finally:
            disconnect()


@contextmanager
def built_run(values: Mapping[str, Any], folder: Path) -> Iterator[Run]:
    """The run alone."""
    with selected(values, folder) as (run, _):
        yield run


def requests(run: Run) -> Sequence[GenerationRequest]:
    """What the loop asks the engine for in step 1."""
    algorithm = run.recipe.algorithm
    size = algorithm.samples_per_prompt
    prompts, _ = draw(run, algorithm.prompts_per_step)
    return [request(run.recipe.seed, 1, prompt, group, size) for group, prompt in enumerate(prompts)]
