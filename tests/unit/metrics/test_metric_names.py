"""Names other people's dashboards already read, and no name undefined."""

from __future__ import annotations

import pytest

from mmrl_core.metrics.names import (
    METRICS,
    UnknownMetricError,
    check_known,
    find,
    is_volatile,
    reproducible,
)

PUBLISHED_TABLE = """
timing/all timing/update timing/rollout timing/old_log_p timing/reference_model timing/resharding_to_train
timing/resharding_to_infer timing/adv timing/non_overlap_reference_model timing/non_overlap_adv timing/ref_onload
timing/ref_offload timing/rule_reward timing/reward_model timing/non_overlap_rule_reward
timing/non_overlap_reward_model actor/entropy actor/kl_loss actor/pg_loss actor/pg_clipfrac actor/ppo_kl actor/lr
grad_norm grpo/lr grpo/score/mean grpo/score/max grpo/score/min grpo/rewards/mean grpo/rewards/max grpo/rewards/min
response_length/mean response_length/min response_length/max prompt_length/mean prompt_length/max prompt_length/min
e2e_tps update_tps vllm_tps
"""
"""MindSpeed-RL's and MindSpeed-MM's tables."""


def test_published_names_are_exact() -> None:
    exact = {metric.name for metric in METRICS if not metric.is_family}
    assert set(PUBLISHED_TABLE.split()) <= exact


def test_every_name_once_with_unit_and_meaning() -> None:
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
    assert all(metric.unit and metric.meaning.endswith(".") for metric in METRICS)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("reward/math/mean", "reward/{name}/mean"),
        ("reward/my-plugin:math/format", "reward/{name}/{sub_score}"),
        ("eval/reward/math/mean", "eval/reward/{name}/mean"),
        ("eval/score/mean", "eval/score/mean"),
    ],
)
def test_families(name: str, family: str) -> None:
    metric = find(name)
    assert metric is not None
    assert metric.name == family


@pytest.mark.parametrize(
    "name", ["reward/math", "reward//mean", "reward/a/b/c", "timing/unheard_of", "e2e", "Xgrad_norm"]
)
def test_undefined_names(name: str) -> None:
    with pytest.raises(UnknownMetricError, match=name):
        check_known(["grad_norm", name])
    assert issubclass(UnknownMetricError, AssertionError)


def test_the_nearest_name_is_suggested() -> None:
    with pytest.raises(UnknownMetricError, match="'actor/pg_clipfrac'"):
        check_known(["actor/pg_clip_frac"])


def test_volatile_is_time_memory_and_throughput_only() -> None:
    volatile = {metric.name for metric in METRICS if is_volatile(metric.name)}
    by_unit = {metric.name for metric in METRICS if metric.unit in ("s", "tokens/s/device", "samples/s", "GB")}
    assert volatile == by_unit | {"perf/mfu"}
    assert reproducible({"timing/all": 1.0, "grad_norm": 2.0, "perf/tokens": 3.0}) == {
        "grad_norm": 2.0,
        "perf/tokens": 3.0,
    }
