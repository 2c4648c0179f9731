"""Rows of the combination cpu + fsdp2 + hf + numeric + causal_lm: the parts of a step, and the step.

Work is fixed: 4 prompts x 8 samples, every response has exactly `--tokens` tokens (the end token does not end it).
`tokens_per_second` counts prompt and response tokens of all samples, as the metrics `e2e_tps` and `update_tps` do;
`generated_tokens_per_second` counts response tokens only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from rig import requests

from mmrl_core.contracts import Minibatch, Rollouts
from mmrl_core.grpo.collect import StepBatch, collect
from mmrl_core.grpo.distribute import Layouts
from mmrl_core.grpo.losses import build_loss
from mmrl_core.grpo.minibatches import build_minibatch
from mmrl_core.grpo.run import Run
from mmrl_core.grpo.step_metrics import step_metrics
from mmrl_core.grpo.trainer import advantage_table, hand_over_weights, shaped_rewards, train_step

Row = Callable[..., float]

pytestmark = pytest.mark.benchmark(group="cpu+fsdp2+hf+numeric+causal_lm")


def test_rollout(bench: Any, row: Row) -> None:
    """Generation of the step's 32 samples, decoding to text included."""
    run = bench.run()
    asked = requests(run)
    rollouts = run.engine.generate(asked, run.sampling)
    shape = checked_shape(rollouts, bench)
    row(lambda: run.engine.generate(asked, run.sampling), **shape, **rates(shape, generated=True))


def test_old_log_probs(bench: Any, row: Row) -> None:
    """A separate pass for log-probs, as with several updates per rollout."""
    run = bench.run()
    rollouts = run.engine.generate(requests(run), run.sampling)
    shape = checked_shape(rollouts, bench)
    row(lambda: run.backend.replay(rollouts), **shape, **rates(shape))


def test_update(bench: Any, row: Row) -> None:
    """Forward, backward, clipping and AdamW on the step's samples in one micro-batch of 4 groups."""
    run = bench.run()
    batch = collect(run, 1)
    shape = checked_shape(batch.rollouts, bench)
    minibatch, loss = whole_minibatch(run, batch), build_loss(run.recipe.algorithm)
    row(lambda: run.backend.update(minibatch, loss), **shape, **rates(shape))


def test_weight_sync(bench: Any, row: Row) -> None:
    """New weights into an engine with its own copy."""
    run = bench.run(weights="own")
    size = sum(t.numel() * t.element_size() for bucket in run.backend.export_weights() for _, t in bucket)
    row(lambda: hand_over_weights(run), bytes=size, model=bench.size, per_second={"bytes_per_second": float(size)})


def test_step(bench: Any, row: Row) -> None:
    """The whole step: prompts, rollout, rewards, advantages, update, hand-over, metrics. Nothing is written."""
    run = bench.run()
    layouts = Layouts.gather(run.world, run.engine.replica, run.backend.replica)

    def step() -> StepBatch:
        run.progress.step += 1
        learned, batch = train_step(run, run.progress.step, layouts)
        step_metrics(run, batch, learned, run.timers.collect())
        return batch

    shape = checked_shape(step().rollouts, bench)
    row(step, **shape, **rates(shape, generated=True))


def whole_minibatch(run: Run, batch: StepBatch) -> Minibatch:
    """All groups of the step as one minibatch, as the loop builds it."""
    rewards = shaped_rewards(run, batch.kept, batch.rollouts, None, None)
    return build_minibatch(
        batch.rollouts,
        {row.sample_id for row in batch.kept},
        batch.kept,
        advantage_table(run, batch.kept, rewards, 1),
        run.recipe.algorithm,
        max_actions=run.policy.max_actions,
        old_log_probs=None,
        reference=None,
    )


def checked_shape(rollouts: Rollouts, bench: Any) -> dict[str, Any]:
    """What was worked on; the length of every response is part of the row's meaning, so it is checked."""
    lengths = [len(ids) for ids in rollouts.payload["response_ids"]]
    prompts = [len(ids) for ids in rollouts.payload["prompt_ids"]]
    assert lengths == [bench.tokens] * len(rollouts)
    assert rollouts.mask.sum().item() == sum(lengths)
    return {
        "model": bench.size,
        "samples": len(rollouts),
        "groups": len(rollouts.group_id.unique()),
        "prompt_tokens": sum(prompts),
        "response_tokens": sum(lengths),
        "longest_prompt": max(prompts),
        "dtype": "float32",
    }


def rates(shape: dict[str, Any], *, generated: bool = False) -> dict[str, Any]:
    """Amounts of work that become rates."""
    amounts = {"tokens_per_second": float(shape["prompt_tokens"] + shape["response_tokens"])}
    if generated:
        amounts["generated_tokens_per_second"] = float(shape["response_tokens"])
    return {"per_second": amounts}
