"""A step's metrics from the table of its samples and its updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mmrl_core.grpo.collect import SampleRow, StepBatch
from mmrl_core.grpo.run import Run
from mmrl_core.metrics.names import check_known
from mmrl_core.metrics.throughput import mfu, throughput_metrics, total_throughput


def step_metrics(
    run: Run, batch: StepBatch, learned: Mapping[str, float], timing: Mapping[str, float]
) -> dict[str, float]:
    """Every metric of a step. Collective. Raises nothing for a user's doing: an undefined name is our own mistake."""
    table = batch.table
    metrics = {**learned, **timing}
    metrics.update(_spread("grpo/score", [row.score for row in table if row.score is not None]))
    metrics.update(_tokens(table, run.world.size, timing))
    metrics.update(_per_reward(table))
    if "actor/lr" in learned:
        metrics["grpo/lr"] = learned["actor/lr"]
    metrics.pop("loss", None)
    metrics["rewards/failed_samples"] = float(sum(row.score is None for row in table))
    metrics["rewards/dropped_groups"] = float(len({r.group_id for r in table if r.drop_group}))
    metrics["rewards/timeouts"] = batch.facts["timeouts"]
    metrics["rewards/restarts"] = batch.facts["restarts"]
    metrics["data/prompts_seen"] = float(run.progress.cursor)
    metrics["data/epoch"] = run.progress.cursor / len(run.source)
    metrics["data/skipped_long_prompts"] = float(batch.skipped_prompts)
    if run.recipe.algorithm.dynamic_sampling is not None:
        metrics["dynamic_sampling/rounds"] = float(batch.rounds)
        metrics["dynamic_sampling/dropped_groups"] = float(batch.dropped_equal)
    metrics["policy_version"] = float(batch.rollouts.policy_version)
    seconds = timing.get("timing/all", 0.0)
    if seconds > 0:
        metrics["perf/samples_per_second"] = len(table) / seconds
    used = utilisation(run, batch, timing.get("timing/update", 0.0))
    if used is not None:
        metrics["perf/mfu"] = used
    peak = run.device.memory().peak
    if peak is not None:
        metrics["perf/memory_peak_gb"] = peak / 1e9
    check_known(metrics)
    return metrics


def utilisation(run: Run, batch: StepBatch, seconds: float) -> float | None:
    """MFU of the updates, which took `seconds`: three forwards of what was trained on, once an epoch; None: unknown.
    Collective."""
    peak = run.device.peak_flops(getattr(torch, run.recipe.model.dtype))
    mine: float | None = 0.0
    if run.engine.replica.is_root and len(batch.rollouts):  # the replica's other ranks hold the same rows
        mine = None if peak is None else run.policy.flops(batch.rollouts)
    parts = run.world.gather(mine)
    known = [part for part in parts if part is not None]
    forward = sum(known) if len(known) == len(parts) else None
    return mfu(
        flops=None if not forward else 3 * run.recipe.algorithm.epochs * forward,
        seconds=seconds,
        devices=run.world.size,
        peak_flops=peak,
    )


def _tokens(table: Sequence[SampleRow], devices: int, timing: Mapping[str, float]) -> dict[str, float]:
    """Lengths and tokens a second; nothing for a policy without tokens."""
    prompts = [row.prompt_length for row in table if row.prompt_length is not None]
    responses = [row.response_length for row in table if row.response_length is not None]
    if not prompts:
        return {}
    metrics = {**_spread("prompt_length", prompts), **_spread("response_length", responses)}
    metrics["response_length/truncated_fraction"] = sum(row.truncated for row in table) / len(table)
    tokens = sum(prompts) + sum(responses)
    metrics["perf/tokens"] = float(tokens)
    if timing.get("timing/all", 0.0) > 0:
        metrics["perf/throughput"] = total_throughput(tokens=tokens, seconds=timing["timing/all"], devices=devices)
    metrics.update(
        throughput_metrics(
            mean_prompt=metrics["prompt_length/mean"],
            mean_response=metrics["response_length/mean"],
            prompts=len(table),
            samples=1,
            devices=devices,
            timing=timing,
        )
    )
    return metrics


def _per_reward(table: Sequence[SampleRow]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for row in table:
        for name, value in row.rewards.items():
            values.setdefault(f"reward/{name}/mean", []).append(value)
        for name, value in row.sub_scores.items():
            values.setdefault(f"reward/{name}", []).append(value)
    return {name: sum(column) / len(column) for name, column in values.items()}


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {f"{name}/mean": sum(values) / len(values), f"{name}/max": max(values), f"{name}/min": min(values)}
