"""Every metric name, defined once. This module imports no torch.

A name without braces is exact; one with `{placeholder}` is a family: each placeholder
stands for one or more characters other than `/`. The names under `timing/`, `actor/`, `grpo/`, the lengths, `grad_norm`
and the `*_tps` are those of MindSpeed-RL's logs, so that dashboards made for it keep working.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from mmrl_core.errors import nearest


class UnknownMetricError(AssertionError):
    """Our own code emitted a metric name that is not defined here."""


@dataclass(frozen=True)
class Metric:
    """One name, or a family of names."""

    name: str
    unit: str
    """s, tokens/s/device, actions, fraction, ...; `1` for a plain number."""
    meaning: str

    @property
    def is_family(self) -> bool:
        """Whether the name has placeholders."""
        return "{" in self.name

    def matches(self, name: str) -> bool:
        """Whether `name` is this metric or a member of this family."""
        return name == self.name or (self.is_family and _pattern(self.name).fullmatch(name) is not None)


TIMING = (
    Metric("timing/all", "s", "One whole step, as far as the loop counts it to the step."),
    Metric("timing/rollout", "s", "Generating the step's samples."),
    Metric("timing/update", "s", "Optimizer steps: forward, backward and update over all minibatches."),
    Metric("timing/old_log_p", "s", "Recomputing the sampling policy's log-probs before the update."),
    Metric("timing/reference_model", "s", "The frozen reference's pass."),
    Metric("timing/resharding_to_train", "s", "Bringing weights and optimizer back to training after generation."),
    Metric("timing/resharding_to_infer", "s", "Bringing weights to the form and place that generation needs."),
    Metric("timing/adv", "s", "Computing advantages."),
    Metric("timing/rule_reward", "s", "Scoring with rule rewards."),
    Metric("timing/reward_model", "s", "Scoring with reward models."),
    Metric("timing/ref_onload", "s", "The part of the reference pass that brings the reference to the device."),
    Metric("timing/ref_offload", "s", "The part of the reference pass that frees the device of it."),
    Metric(
        "timing/non_overlap_reference_model",
        "s",
        "Waiting for a reference pass that was meant to be hidden, beyond timing/reference_model; 0 when it runs in "
        "sequence.",
    ),
    Metric("timing/non_overlap_adv", "s", "Waiting for advantages that were meant to be hidden; 0 in sequence."),
    Metric(
        "timing/non_overlap_rule_reward", "s", "Waiting for rule rewards that were meant to be hidden; 0 in sequence."
    ),
    Metric(
        "timing/non_overlap_reward_model", "s", "Waiting for reward models that were meant to be hidden; 0 in sequence."
    ),
    Metric("timing/weights", "s", "Handing new weights to the rollout engine."),
    Metric("timing/data", "s", "Fetching and encoding prompts."),
    Metric("timing/checkpoint", "s", "Writing the checkpoint after the step before this one."),
    Metric("timing/eval", "s", "Held-out evaluation."),
)
"""Wall seconds by phase, as rank 0 sees them, the device synchronised at both ends. All are there every step."""

COLOCATED_SUM = (
    "rollout",
    "old_log_p",
    "update",
    "reference_model",
    "resharding_to_train",
    "resharding_to_infer",
    "non_overlap_reference_model",
)
"""With everything on the same devices, timing/all is at least the sum of these phases."""

PARTS = ("all", "ref_onload", "ref_offload")
"""Phases that contain others or are contained in one; every second of a step belongs to at most one of the rest."""

ACTOR = (
    Metric("actor/pg_loss", "1", "Policy-gradient loss, in the recipe's aggregation; mean over the step's updates."),
    Metric("actor/pg_clipfrac", "fraction", "Actions whose ratio was clipped from above or below."),
    Metric("actor/pg_clipfrac_lower", "fraction", "Actions with negative advantage held by the dual clip."),
    Metric("actor/ppo_kl", "nats", "Mean of old minus current log-prob: how far the update moved the policy."),
    Metric("actor/entropy", "nats", "Mean entropy of the action distribution."),
    Metric(
        "actor/kl_loss", "nats", "Divergence from the frozen reference, as the recipe's estimator, before its weight."
    ),
    Metric("actor/lr", "1", "Learning rate of the step's last update."),
    Metric("actor/skipped_updates", "updates", "Updates that all ranks skipped because a gradient was not finite."),
    Metric("grad_norm", "1", "Global gradient norm before clipping; mean over the step's updates."),
    Metric("policy_version", "updates", "How many updates the weights that sampled this step had seen."),
)

MISMATCH = (
    Metric("mismatch/kl", "nats", "Mean of behaviour minus training log-prob, same weights (k1)."),
    Metric("mismatch/k3", "nats", "Mean of exp(d) - 1 - d with d training minus behaviour log-prob."),
    Metric("mismatch/ratio", "1", "Mean of exp(training - behaviour log-prob); 1 when the engine agrees."),
    Metric("mismatch/log_prob_diff", "nats", "Mean absolute difference of behaviour and training log-probs."),
    Metric("mismatch/log_prob_diff_max", "nats", "Largest absolute difference of behaviour and training log-probs."),
    Metric("mismatch/corrected_fraction", "fraction", "Actions or samples whose importance weight was cut or masked."),
)

GRPO = (
    Metric("grpo/lr", "1", "Learning rate; the same as actor/lr."),
    Metric("grpo/score/mean", "1", "Raw score of a sample (weighted sum of the rewards): mean over the step."),
    Metric("grpo/score/max", "1", "Raw score: maximum."),
    Metric("grpo/score/min", "1", "Raw score: minimum."),
    Metric("grpo/rewards/mean", "1", "What advantages are made of (raw score, less a KL penalty in the reward): mean."),
    Metric("grpo/rewards/max", "1", "What advantages are made of: maximum."),
    Metric("grpo/rewards/min", "1", "What advantages are made of: minimum."),
    Metric("grpo/advantages/mean", "1", "Advantage of a sample: mean."),
    Metric("grpo/advantages/max", "1", "Advantage of a sample: maximum."),
    Metric("grpo/advantages/min", "1", "Advantage of a sample: minimum."),
    Metric("dynamic_sampling/rounds", "rounds", "Rounds of generation the step took."),
    Metric("dynamic_sampling/dropped_groups", "groups", "Groups left out because all their rewards were equal."),
)

REWARDS = (
    Metric("reward/{name}/mean", "1", "One reward, before its weight: mean over the samples it scored."),
    Metric("reward/{name}/{sub_score}", "1", "A named sub-score of one reward: mean over the samples that carry it."),
    Metric("rewards/failed_samples", "samples", "Samples left without a reward; none of them became a number."),
    Metric("rewards/dropped_groups", "groups", "Groups left out because of failed samples."),
    Metric("rewards/timeouts", "batches", "Batches whose worker was killed at its deadline."),
    Metric("rewards/restarts", "workers", "Reward workers started again."),
)

DATA = (
    Metric("response_length/mean", "actions", "Response length: mean."),
    Metric("response_length/max", "actions", "Response length: maximum."),
    Metric("response_length/min", "actions", "Response length: minimum."),
    Metric("response_length/truncated_fraction", "fraction", "Samples stopped by the length limit."),
    Metric("prompt_length/mean", "tokens", "Prompt length: mean."),
    Metric("prompt_length/max", "tokens", "Prompt length: maximum."),
    Metric("prompt_length/min", "tokens", "Prompt length: minimum."),
    Metric("data/prompts_seen", "prompts", "Prompts drawn since the run began."),
    Metric("data/epoch", "epochs", "Prompts drawn divided by the prompts of one epoch."),
    Metric("data/skipped_long_prompts", "prompts", "Prompts left out so far because they exceed the limit."),
)

PERFORMANCE = (
    Metric(
        "e2e_tps",
        "tokens/s/device",
        "(mean prompt + mean response length) * prompts * samples per prompt / devices / timing/all.",
    ),
    Metric("update_tps", "tokens/s/device", "The same tokens over timing/update."),
    Metric(
        "vllm_tps", "tokens/s/device", "The same tokens, prompts included, over timing/rollout, whatever the engine."
    ),
    Metric("perf/throughput", "tokens/s/device", "All tokens of the step / (timing/all * devices), as verl counts."),
    Metric("perf/tokens", "tokens", "Prompt and response tokens of the step."),
    Metric(
        "perf/samples_per_second",
        "samples/s",
        "Samples of the step over the time of the whole step, all devices together.",
    ),
    Metric(
        "perf/mfu",
        "fraction",
        "Model FLOP/s of the update over the devices' peak; absent when the peak or the FLOPs are unknown.",
    ),
    Metric(
        "perf/memory_peak_gb", "GB", "Peak device memory of rank 0 (10^9 bytes); absent when it cannot be measured."
    ),
)

EVAL = (
    Metric("eval/score/mean", "1", "Held-out score: mean over prompts of the mean over their samples."),
    Metric("eval/score/max", "1", "Held-out score of a prompt: maximum."),
    Metric("eval/score/min", "1", "Held-out score of a prompt: minimum."),
    Metric("eval/reward/{name}/mean", "1", "One reward on held-out prompts, before its weight: mean."),
    Metric("eval/reward/{name}/{sub_score}", "1", "A named sub-score on held-out prompts: mean."),
    Metric("eval/response_length/mean", "actions", "Response length on held-out prompts: mean."),
    Metric("eval/response_length/truncated_fraction", "fraction", "Held-out samples stopped by the length limit."),
    Metric("eval/prompts", "prompts", "Held-out prompts evaluated."),
    Metric("eval/failed_samples", "samples", "Held-out samples left without a reward."),
)

METRICS: tuple[Metric, ...] = (*GRPO, *REWARDS, *ACTOR, *MISMATCH, *DATA, *TIMING, *PERFORMANCE, *EVAL)
"""The registry."""

VOLATILE = ("timing/*", "*_tps", "perf/throughput", "perf/samples_per_second", "perf/mfu", "perf/memory_peak_gb")
"""Patterns of what differs between two equal runs: time, throughput and memory. Everything else must be bit-equal."""


@functools.lru_cache(maxsize=4096)
def find(name: str) -> Metric | None:
    """The metric or family that `name` belongs to; exact names come before families."""
    return next((metric for metric in sorted(METRICS, key=_placeholders) if metric.matches(name)), None)


def check_known(names: Iterable[str]) -> None:
    """Raises UnknownMetricError naming every name that is not defined, with the nearest that is."""
    unknown = [name for name in names if find(name) is None]
    if unknown:
        known = [metric.name for metric in METRICS]
        words = "; ".join(f"{name!r} is not a defined metric.{nearest(name, known)}" for name in unknown)
        raise UnknownMetricError(f"{words} Define it in mmrl_core/metrics/names.py")


def is_volatile(name: str) -> bool:
    """Whether `name` is left out of bit-equality comparisons."""
    return any(fnmatchcase(name, pattern) for pattern in VOLATILE)


def reproducible(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that two equal runs must agree on bit for bit."""
    return {name: value for name, value in metrics.items() if not is_volatile(name)}


def _placeholders(metric: Metric) -> int:
    return metric.name.count("{")


@functools.cache
def _pattern(family: str) -> re.Pattern[str]:
    parts = re.split(r"\{\w+\}", family)
    return re.compile("[^/]+".join(re.escape(part) for part in parts))
