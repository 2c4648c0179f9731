"""Several rewards from the executor to advantages: names, weights, shuffling and dynamic sampling."""

from __future__ import annotations

import statistics
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmrl_core.contracts import Prompt, Sample
from mmrl_core.grpo.collect import SampleRow, _usable_groups
from mmrl_core.grpo.trainer import advantage_table
from mmrl_core.plugins import Selected, import_string, load_plugins
from mmrl_core.recipe import AlgorithmSpec, RewardChoice
from mmrl_core.rewards.executor import RewardExecutor

CHOICES = [
    {"name": "length", "run": "inline", "maximum": 4, "ramp": 2, "weight": 2.0},
    {"name": "length", "label": "brief", "run": "inline", "maximum": 2, "ramp": 4, "weight": -1.0},
    {"name": "length", "label": "watched", "run": "inline", "maximum": 1, "ramp": 1, "weight": 0.0},
]


def choices() -> list[RewardChoice]:
    return [RewardChoice.model_validate(one) for one in CHOICES]


def sample(length: int) -> Sample:
    return Sample(sample_id=length, group_id=0, prompt=Prompt(index=0, text="?"), text="x" * length, length=length)


def test_one_component_under_several_labels_is_several_rewards() -> None:
    found = load_plugins().get("reward", "length")
    selected = [Selected(found=found, options=_options(found, choice.options)) for choice in choices()]
    with RewardExecutor(choices(), selected, "cpu") as executor:
        executor.setup()
        scored = executor.score([sample(n) for n in (1, 3, 5, 9)])
    for one in scored:
        assert set(one.per_reward) == {"length", "brief", "watched"}
        assert one.value == pytest.approx(2 * one.per_reward["length"] - one.per_reward["brief"])
    assert len({one.per_reward["watched"] for one in scored}) > 1, "a reward of weight 0 is computed"
    assert set(executor.failures) == {"length", "brief", "watched"}


def _options(found: Any, values: dict[str, Any]) -> Any:
    return import_string(found.component.options, "options").model_validate(values)


# ---------------------------------------------------------------------------------------------------------- the table

VALUES = {
    0: [(0.0, 100.0, 5.0), (1.0, -300.0, 1.0), (0.0, 250.0, 2.0), (1.0, 50.0, 9.0)],
    1: [(0.5, 10.0, 1.0), (0.5, 30.0, 2.0), (0.5, 20.0, 3.0)],
    2: [(1.0, 2.0, 1.0), (2.0, 4.0, 3.0)],  # 2 * first - second is 0 for both
}
NAMES = ("length", "brief", "watched")
WEIGHTS = (2.0, -1.0, 0.0)


def table() -> list[SampleRow]:
    rows = [(group, values) for group, members in VALUES.items() for values in members]
    return [
        SampleRow(
            group_id=group,
            sample_id=10 + i,
            holder=0,
            score=sum(w * v for w, v in zip(WEIGHTS, values, strict=True)),
            drop_group=False,
            rewards=dict(zip(NAMES, values, strict=True)),
            sub_scores={},
            prompt_length=None,
            response_length=None,
            actions=1,
            truncated=False,
        )
        for i, (group, values) in enumerate(rows)
    ]


def run(**fields: Any) -> Any:
    algorithm = AlgorithmSpec(**{"steps": 1, "prompts_per_step": 3, "samples_per_prompt": 4, **fields})
    return SimpleNamespace(estimator=None, recipe=SimpleNamespace(seed=3, rewards=choices(), algorithm=algorithm))


def expected(rows: list[SampleRow], eps: float) -> dict[int, float]:
    answer = dict.fromkeys((row.sample_id for row in rows), 0.0)
    for group in VALUES:
        members = [row for row in rows if row.group_id == group]
        for name, weight in zip(NAMES, WEIGHTS, strict=True):
            values = [row.rewards[name] for row in members]
            if len(set(values)) == 1:
                continue
            for row in members:
                advantage = (row.rewards[name] - statistics.fmean(values)) / (statistics.stdev(values) + eps)
                answer[row.sample_id] += weight * advantage
    return answer


def scores(rows: list[SampleRow]) -> torch.Tensor:
    return torch.tensor([row.score for row in rows], dtype=torch.float64)


def test_advantages_are_combined_by_label_and_weight() -> None:
    rows = table()
    found = advantage_table(run(advantage={"combine": "advantages", "eps": 1e-3}), rows, scores(rows), 1)
    assert found == pytest.approx(expected(rows, 1e-3), rel=1e-6, abs=1e-7)
    of_sum = advantage_table(run(advantage={"eps": 1e-3}), rows, scores(rows), 1)
    assert found != pytest.approx(of_sum, abs=0.1)
    assert [of_sum[row.sample_id] for row in rows if row.group_id == 2] == [0.0, 0.0]


def test_shuffling_moves_a_samples_rewards_together() -> None:
    rows = table()
    found = advantage_table(run(shuffle_rewards=True, advantage={"combine": "advantages"}), rows, scores(rows), 1)
    straight = advantage_table(run(advantage={"combine": "advantages"}), rows, scores(rows), 1)
    for group in VALUES:
        ids = [row.sample_id for row in rows if row.group_id == group]
        assert sorted(found[i] for i in ids) == pytest.approx(sorted(straight[i] for i in ids))
    assert found != pytest.approx(straight)


@pytest.mark.parametrize(("combine", "usable"), [("rewards", {0, 1}), ("advantages", {0, 1, 2})])
def test_dynamic_sampling_keeps_what_teaches_something(combine: str, usable: set[int]) -> None:
    asked = run(advantage={"combine": combine}, dynamic_sampling={"max_rounds": 2})
    assert _usable_groups(asked, table()) == (usable, 3 - len(usable))


def test_a_reward_of_weight_0_makes_no_group_worth_keeping() -> None:
    rows = [row for row in table() if row.group_id == 1]
    equal = [SampleRow(**{**vars(row), "rewards": {**row.rewards, "brief": 1.0}, "score": 0.0}) for row in rows]
    asked = run(advantage={"combine": "advantages"}, dynamic_sampling={"max_rounds": 2})
    assert _usable_groups(asked, equal) == (set(), 1)
