"""Throughput by its published definitions."""

from __future__ import annotations

import pytest

from mmrl_core.metrics.throughput import mfu, throughput_metrics, total_throughput


def test_against_a_count_by_hand() -> None:
    """2 prompts x 3 samples: the tokens counted one by one, over 2 devices."""
    prompts = [5, 5, 5, 8, 8, 8]
    responses = [2, 4, 6, 1, 1, 4]
    tokens = sum(prompts) + sum(responses)
    found = throughput_metrics(
        mean_prompt=sum(prompts) / 6,
        mean_response=sum(responses) / 6,
        prompts=2,
        samples=3,
        devices=2,
        timing={"timing/all": 4.0, "timing/update": 2.0, "timing/rollout": 1.0},
    )
    assert found == pytest.approx({"e2e_tps": tokens / 8, "update_tps": tokens / 4, "vllm_tps": tokens / 2})
    assert total_throughput(tokens=tokens, seconds=4.0, devices=2) == pytest.approx(found["e2e_tps"])


def test_a_published_figure() -> None:
    """32 prompts x 8 samples on 16 devices: 220 tokens/s a device are about 3,000 tokens a sample in 218 s."""
    found = throughput_metrics(
        mean_prompt=1000.0, mean_response=2000.0, prompts=32, samples=8, devices=16, timing={"timing/all": 218.18}
    )
    assert found == {"e2e_tps": pytest.approx(220.0, rel=1e-3)}


def test_utilisation() -> None:
    assert mfu(flops=6e12, seconds=2.0, devices=3, peak_flops=2e12) == 0.5
    assert mfu(flops=6e12, seconds=2.0, devices=3, peak_flops=None) is None
    assert mfu(flops=None, seconds=2.0, devices=3, peak_flops=2e12) is None
    assert mfu(flops=6e12, seconds=0.0, devices=3, peak_flops=2e12) is None
