"""Rows of the combination cpu + fsdp2 + flow + brightness + flow: the parts of a step, and the step.

`dit`: the network and the work of `peers/flow_plain.py`, 10 prompts x 16 samples. `flux` and `wan21`: tiny random
pipelines of the published structure, 2 prompts x 4 samples, VAE included in the rollout (prompts are encoded once and
remembered); their time is almost only Python's, ours and that of the libraries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from flow_rig import dit_folder, flow_recipe
from rig import built_run, requests

from mmrl_core.contracts import Minibatch, Rollouts
from mmrl_core.grpo.collect import StepBatch, collect
from mmrl_core.grpo.distribute import Layouts
from mmrl_core.grpo.losses import build_loss
from mmrl_core.grpo.minibatches import build_minibatch, split_samples
from mmrl_core.grpo.run import Run
from mmrl_core.grpo.step_metrics import step_metrics
from mmrl_core.grpo.trainer import advantage_table, shaped_rewards, train_step
from mmrl_core.testing.tiny_pipelines import tiny_pipeline

Row = Callable[..., float]
ROUNDS = {"dit": 5, "flux": 10, "wan21": 10}

pytestmark = pytest.mark.benchmark(group="cpu+fsdp2+flow+brightness+flow")


@pytest.fixture(scope="module", params=sorted(ROUNDS))
def family(request: pytest.FixtureRequest) -> str:
    """Module-scoped, so that rows of one model follow each other and share its run."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def run(family: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run ready for its first step."""
    folder = tmp_path_factory.mktemp(family)
    with ExitStack() as stack:
        yield stack.enter_context(built_run(recipe(family, folder), folder))


@pytest.fixture
def count(request: pytest.FixtureRequest, family: str) -> int:
    """Times a row is measured: --rounds, or the model's own."""
    asked: int | None = request.config.getoption("rounds")
    return ROUNDS[family] if asked is None else asked


def recipe(family: str, folder: Path) -> dict[str, Any]:
    """Of a family; those of pipelines differ in what fits their model and in having less to do."""
    if family == "dit":
        return flow_recipe(dit_folder(folder / "model"), folder)
    values = flow_recipe(tiny_pipeline(folder / "model", "flux" if family == "flux" else "wan21"), folder)
    values["sampling"] |= {"steps": 6, "height": 32, "width": 32, "frames": 1 if family == "flux" else 5}
    values["backend"]["micro_batch_groups"] = 1
    values["algorithm"] |= {"prompts_per_step": 2, "samples_per_prompt": 4}
    return values


def test_rollout(run: Run, row: Row, family: str, count: int) -> None:
    """Denoising of the step's samples from prompts to pixels."""
    asked = requests(run)
    rollouts = run.engine.generate(asked, run.sampling)
    assert len(rollouts.samples) == len(rollouts)
    row(lambda: run.engine.generate(asked, run.sampling), count=count, **facts(run, family, rollouts))


def test_old_log_probs(run: Run, row: Row, family: str, count: int) -> None:
    """A separate pass for log-probs of the trained steps, which `old_log_probs: behaviour` saves."""
    rollouts = run.engine.generate(requests(run), run.sampling)
    row(lambda: run.backend.replay(rollouts), count=count, **facts(run, family, rollouts))


def test_update(run: Run, row: Row, family: str, count: int) -> None:
    """Forward, backward, clipping and AdamW of the first of the step's two minibatches, on half of its samples."""
    minibatch, loss = first_minibatch(run, collect(run, 1)), build_loss(run.recipe.algorithm)
    row(lambda: run.backend.update(minibatch, loss), count=count, **facts(run, family, minibatch.rollouts))


def test_step(run: Run, row: Row, family: str, count: int) -> None:
    """The whole step: prompts, rollout, rewards, advantages, two updates, metrics. Nothing is written."""
    layouts = Layouts.gather(run.world, run.engine.replica, run.backend.replica)

    def step() -> StepBatch:
        run.progress.step += 1
        learned, batch = train_step(run, run.progress.step, layouts)
        step_metrics(run, batch, learned, run.timers.collect())
        return batch

    row(step, count=count, **facts(run, family, step().rollouts))


def first_minibatch(run: Run, batch: StepBatch) -> Minibatch:
    """The first of the step's minibatches, as the loop builds it."""
    rewards = shaped_rewards(run, batch.kept, batch.rollouts, None, None)
    return build_minibatch(
        batch.rollouts,
        split_samples(batch.kept, run.recipe.algorithm)[0],
        batch.kept,
        advantage_table(run, batch.kept, rewards, 1),
        run.recipe.algorithm,
        max_actions=run.policy.max_actions,
        old_log_probs=batch.rollouts.behaviour_log_probs,
        reference=None,
    )


def facts(run: Run, family: str, rollouts: Rollouts) -> dict[str, Any]:
    """What was worked on; every sample has the same number of trained steps, which is part of the row's meaning."""
    trained = run.policy.max_actions
    assert rollouts.mask.sum(-1).tolist() == [trained] * len(rollouts)
    sampling: Any = run.sampling
    return {
        "model": family,
        "samples": len(rollouts),
        "groups": len(rollouts.group_id.unique()),
        "denoising_steps": sampling.steps,
        "trained_steps": trained,
        "latent": list(rollouts.payload["states"][0].shape[1:]),
        "dtype": "float32",
        "per_second": {"samples_per_second": float(len(rollouts))},
    }
