"""Throughput and utilisation: the published definitions as pure functions. This module imports no torch."""

from __future__ import annotations

from collections.abc import Mapping


def tokens_per_second(
    *, mean_prompt: float, mean_response: float, prompts: int, samples: int, devices: int, seconds: float
) -> float:
    """MindSpeed-RL's tokens/s of one device: (mean_response + mean_prompt) * prompts * samples / devices / seconds.

    `prompts` is the step's number of prompts, `samples` the group size, lengths are in tokens. `seconds` > 0.
    """
    assert seconds > 0
    assert devices > 0
    return (mean_response + mean_prompt) * prompts * samples / devices / seconds


def throughput_metrics(
    *,
    mean_prompt: float,
    mean_response: float,
    prompts: int,
    samples: int,
    devices: int,
    timing: Mapping[str, float],
) -> dict[str, float]:
    """`e2e_tps`, `update_tps` and `vllm_tps` [tokens/s/device] over timing/all, timing/update and timing/rollout.

    The three share one numerator, prompt tokens included, as MindSpeed-RL defines them. The key of a phase that took
    no time is absent: a throughput without time is unknown.
    """
    phases = {"e2e_tps": "timing/all", "update_tps": "timing/update", "vllm_tps": "timing/rollout"}
    return {
        name: tokens_per_second(
            mean_prompt=mean_prompt,
            mean_response=mean_response,
            prompts=prompts,
            samples=samples,
            devices=devices,
            seconds=timing[phase],
        )
        for name, phase in phases.items()
        if timing.get(phase, 0.0) > 0
    }


def total_throughput(*, tokens: int, seconds: float, devices: int) -> float:
    """verl's `perf/throughput` [tokens/s/device]: all tokens / (step time * devices)."""
    assert seconds > 0
    assert devices > 0
    return tokens / (seconds * devices)


def mfu(*, flops: float | None, seconds: float, devices: int, peak_flops: float | None) -> float | None:
    """Model FLOPs utilisation: flops / (seconds * devices * peak of one device), a fraction.

    `flops` are those the model needs, summed over devices. None when the peak or the FLOPs are unknown, or no time
    passed: leave the metric out then.
    """
    if flops is None or peak_flops is None or peak_flops <= 0 or seconds <= 0:
        return None
    return flops / (seconds * devices * peak_flops)
