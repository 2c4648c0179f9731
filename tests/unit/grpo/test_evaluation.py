"""Held-out evaluation: what it asks for, what it reports, and which samples it shows."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmrl_core.contracts import GenerationRequest, Prompt, Replica, Rollouts, Sample
from mmrl_core.errors import RewardError
from mmrl_core.grpo.collect import seed_of
from mmrl_core.grpo.evaluation import Evaluation, Evaluator
from mmrl_core.metrics.names import check_known
from mmrl_core.recipe import EvalSpec
from mmrl_core.rewards.executor import Scored
from mmrl_core.world import World


class Source:
    """Seven prompts, of which the policy does not take number 2."""

    def __len__(self) -> int:
        return 7

    def prompt(self, index: int) -> Prompt:
        return Prompt(index=index, text=f"question {index}", origin=f"row {index}")


class Engine:
    """Answers with its own words; one replica."""

    replica = Replica(index=0, count=1, is_root=True)

    def __init__(self) -> None:
        self.asked: list[GenerationRequest] = []

    def generate(self, requests: Sequence[GenerationRequest], sampling: Any) -> Rollouts:
        self.asked += requests
        pairs = [(r, i) for r in requests for i in r.sample_ids]
        return Rollouts(
            group_id=torch.tensor([r.group_id for r, _ in pairs]),
            sample_id=torch.tensor([i for _, i in pairs]),
            mask=torch.ones(len(pairs), 1, dtype=torch.bool),
            behaviour_log_probs=torch.zeros(len(pairs), 1),
            truncated=torch.zeros(len(pairs), dtype=torch.bool),
            policy_version=0,
            payload={},
            samples=[Sample(sample_id=i, group_id=r.group_id, prompt=r.prompt, text=f"answer {i}") for r, i in pairs],
        )


class Rewards:
    """`falling` falls with the sample id, `other` rises; the score is a weighted sum of both."""

    def __init__(self, failing: int | None = None) -> None:
        self.failing = failing

    def score(self, samples: Sequence[Sample]) -> list[Scored]:
        return [
            Scored(value=None, failure="no", drop_group=False)
            if s.sample_id == self.failing
            else Scored(
                value=-3.0 * s.sample_id,
                failure=None,
                drop_group=False,
                per_reward={"falling": -float(s.sample_id), "other": 10.0 * s.group_id},
            )
            for s in samples
        ]


def evaluator(engine: Any, *, failing: int | None = None, **spec: Any) -> Evaluator:
    return Evaluator(
        spec=EvalSpec(data="list", **{"prompts": 5, "samples_per_prompt": 3, "batch_prompts": 2, **spec}),
        seed=9,
        world=World(),
        policy=SimpleNamespace(accepts=lambda prompt: prompt.index != 2),  # type: ignore[arg-type]
        engine=engine,
        rewards=Rewards(failing),  # type: ignore[arg-type]
        source=Source(),  # type: ignore[arg-type]
        sampling=None,
    )


def evaluated(**spec: Any) -> tuple[Evaluation, Engine]:
    engine = Engine()
    return evaluator(engine, **spec).evaluate(), engine


def test_scores_rewards_texts_and_samples_are_those_of_the_prompts_in_order() -> None:
    found, engine = evaluated(show=2)
    assert found.questions == tuple(f"question {i}" for i in (0, 1, 3, 4, 5))
    assert found.scores == tuple(-3.0 * (3 * g + 1) for g in range(5))
    assert found.rewards == {"falling": pytest.approx(-7.0), "other": pytest.approx(20.0)}
    assert found.mean == pytest.approx(-21.0)
    # the first sample of a prompt, which scores best here and would come last by value
    assert found.texts == tuple(f"answer {3 * g}" for g in range(5))
    assert [(s.text, s.score) for s in found.samples] == [("answer 0", 0.0), ("answer 3", -9.0)]
    assert [r.seeds for r in engine.asked] == [tuple(seed_of(9, 0, 3 * g + k) for k in range(3)) for g in range(5)]
    assert [r.group_seed for r in engine.asked] == [seed_of(9, 0, -2 - g) for g in range(5)]


@pytest.mark.parametrize(("show", "shown"), [(0, 0), (32, 5)])
def test_as_many_samples_as_asked_for_are_kept(show: int, shown: int) -> None:
    found, _ = evaluated(show=show)
    assert [s.group_id for s in found.samples] == list(range(shown))


def test_metrics_and_summary() -> None:
    found, _ = evaluated()
    check_known(found.metrics())
    assert found.metrics() == {
        "eval/score/mean": found.mean,
        "eval/prompts": 5.0,
        "eval/reward/falling/mean": pytest.approx(-7.0),
        "eval/reward/other/mean": pytest.approx(20.0),
    }
    assert found.summary() == {"score": found.mean, "prompts": 5, "rewards": dict(found.rewards)}


def test_a_failed_sample_fails_the_evaluation() -> None:
    with pytest.raises(RewardError, match=r"1 samples failed their reward; the first: row 3: no"):
        evaluator(Engine(), failing=7).evaluate()
