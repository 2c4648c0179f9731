"""A step's metrics from its table, with tokens and without."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmrl_core.contracts import MemoryStats, Rollouts
from mmrl_core.grpo.collect import SampleRow, StepBatch
from mmrl_core.grpo.step_metrics import step_metrics

TIMING = {"timing/all": 4.0, "timing/update": 2.0, "timing/rollout": 1.0}
OF_TOKENS = (
    "prompt_length/",
    "response_length/",
    "perf/tokens",
    "perf/throughput",
    "e2e_tps",
    "update_tps",
    "vllm_tps",
)


def row(sample: int) -> SampleRow:
    return SampleRow(
        group_id=sample // 2,
        sample_id=sample,
        holder=0,
        score=0.5 * sample,
        drop_group=False,
        rewards={"right": float(sample), "second:look": 1.0},
        sub_scores={"right/format": 0.25},
        prompt_length=10,
        response_length=sample,
        actions=3,
        truncated=sample == 3,
    )


def metrics(
    table: list[SampleRow],
    *,
    ranks: int = 1,
    timing: dict[str, float] | None = None,
    peak: float | None = None,
    flops: tuple[float | None, ...] = (None,),
    rows: int = 0,
) -> dict[str, float]:
    """`flops` are what the ranks' policies count for a forward; this rank is the first."""
    run: Any = SimpleNamespace(
        recipe=SimpleNamespace(
            algorithm=SimpleNamespace(dynamic_sampling=None, epochs=2), model=SimpleNamespace(dtype="bfloat16")
        ),
        engine=SimpleNamespace(replica=SimpleNamespace(is_root=True)),
        policy=SimpleNamespace(flops=lambda rollouts: flops[0]),
        progress=SimpleNamespace(cursor=6),
        source=range(12),
        world=SimpleNamespace(size=ranks, gather=lambda mine: [mine, *flops[1:]]),
        device=SimpleNamespace(
            memory=lambda: MemoryStats(allocated=None, peak=None, total=None), peak_flops=lambda dtype: peak
        ),
    )
    rollouts = Rollouts(
        group_id=torch.arange(rows),
        sample_id=torch.arange(rows),
        mask=torch.zeros(rows, 1, dtype=torch.bool),
        behaviour_log_probs=torch.zeros(rows, 1),
        truncated=torch.zeros(rows, dtype=torch.bool),
        policy_version=3,
        payload={},
    )
    batch = StepBatch(
        rollouts=rollouts,
        table=table,
        kept=table,
        samples=[],
        rounds=1,
        dropped_equal=0,
        skipped_prompts=0,
        facts={"timeouts": 0.0, "restarts": 0.0},
    )
    return step_metrics(run, batch, {"actor/lr": 1e-3}, TIMING if timing is None else timing)


def test_with_tokens() -> None:
    found = metrics([row(i) for i in range(4)], ranks=2)
    assert found["prompt_length/mean"] == 10
    assert found["response_length/max"] == 3
    assert found["response_length/truncated_fraction"] == 0.25
    assert found["perf/tokens"] == 46
    assert found["e2e_tps"] == pytest.approx(46 / 2 / 4)
    assert found["perf/throughput"] == pytest.approx(46 / 2 / 4)
    assert found["perf/samples_per_second"] == 1.0, "all devices together"
    assert found["reward/second:look/mean"] == 1.0
    assert found["reward/right/format"] == 0.25


def test_without_tokens() -> None:
    table = [replace(row(i), prompt_length=None, response_length=None) for i in range(4)]
    found = metrics(table, ranks=2)
    assert not [name for name in found if name.startswith(OF_TOKENS)]
    assert found["perf/samples_per_second"] == 1.0
    with_tokens = metrics([row(i) for i in range(4)], ranks=2)
    assert found == {name: value for name, value in with_tokens.items() if not name.startswith(OF_TOKENS)}


def test_a_rate_without_time_is_unknown() -> None:
    found = metrics([row(i) for i in range(4)], timing={"timing/all": 0.0})
    assert "perf/samples_per_second" not in found
    assert "e2e_tps" not in found


def test_utilisation_is_of_all_ranks_and_all_epochs() -> None:
    found = metrics([row(0)], ranks=2, peak=1e12, flops=(2e10, 4e10), rows=4)
    assert found["perf/mfu"] == pytest.approx(2 * 3 * 6e10 / (2.0 * 2 * 1e12))


@pytest.mark.parametrize(
    ("peak", "flops"), [(None, (2e10, 4e10)), (1e12, (None, 4e10)), (1e12, (2e10, None)), (1e12, (0.0, 0.0))]
)
def test_an_unknown_utilisation_is_absent(peak: float | None, flops: tuple[float | None, ...]) -> None:
    assert "perf/mfu" not in metrics([row(0)], ranks=2, peak=peak, flops=flops, rows=4)
