"""Held-out evaluation: the same rewards on prompts that training does not draw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mmrl_core.contracts import Policy, PromptSource, RolloutEngine, Sample
from mmrl_core.errors import RewardError
from mmrl_core.grpo.collect import request, score_everywhere, take_prompts
from mmrl_core.recipe import EvalSpec
from mmrl_core.world import World

if TYPE_CHECKING:
    from mmrl_core.rewards.executor import RewardExecutor


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores of a set of prompts, in the prompts' order."""

    questions: tuple[str, ...]
    scores: tuple[float, ...]
    """Mean over a prompt's samples."""
    rewards: Mapping[str, float]
    """Of each reward, before its weight, by its name in metrics: mean over prompts of the mean over their samples."""
    texts: tuple[str, ...]
    """The first sample of each prompt."""
    samples: tuple[Sample, ...]
    """The first sample of each of the first `EvalSpec.show` prompts, with its score. On ranks other than 0: none."""

    @property
    def mean(self) -> float:
        """Mean over prompts."""
        return sum(self.scores) / len(self.scores)

    def metrics(self) -> dict[str, float]:
        """By name, for observers and the step."""
        rewards = {f"eval/reward/{name}/mean": value for name, value in self.rewards.items()}
        return {"eval/score/mean": self.mean, **rewards, "eval/prompts": float(len(self.scores))}

    def summary(self) -> dict[str, Any]:
        """For people, as JSON values."""
        return {"score": self.mean, "prompts": len(self.scores), "rewards": dict(self.rewards)}


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One held-out sample that was scored."""

    sample_id: int
    group_id: int
    score: float
    rewards: Mapping[str, float]
    text: str


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """Exact two-sided sign test: ties leave no evidence; under the null each change is as likely up as down."""

    better: int
    worse: int
    ties: int
    p_value: float


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """What an evaluation needs, in training or by itself."""

    spec: EvalSpec
    seed: int
    world: World
    policy: Policy
    engine: RolloutEngine
    rewards: RewardExecutor
    source: PromptSource
    sampling: Any

    def evaluate(self) -> Evaluation:
        """Generate and score the recipe's evaluation prompts with the engine's current weights. Collective.

        Raises RewardError when a sample's reward failed: a mean over what is left would be another quantity.
        """
        prompts = take_prompts(self.source, self.policy, self.spec.prompts)
        replica = self.engine.replica
        at_once = self.spec.batch_prompts * replica.count
        rows: list[_Row] = []
        shown: list[Sample] = []
        failures: list[str] = []
        for start in range(0, len(prompts), at_once):
            groups = range(start, min(start + at_once, len(prompts)))
            # step 0: no training step shares its seeds
            requests = [request(self.seed, 0, prompts[g], g, self.spec.samples_per_prompt) for g in groups]
            rollouts = self.engine.generate(requests[replica.index :: replica.count], self.sampling)
            scored = score_everywhere(self.rewards, self.engine, self.world, rollouts.samples)
            for sample, result in zip(rollouts.samples, scored, strict=False):  # scored on replica roots only
                if result.value is None:
                    failures.append(f"{sample.prompt.origin}: {result.failure}")
                    continue
                rows.append(
                    _Row(
                        sample_id=sample.sample_id,
                        group_id=sample.group_id,
                        score=result.value,
                        rewards=result.per_reward,
                        text=sample.text or "",
                    )
                )
                first = sample.group_id * self.spec.samples_per_prompt
                if sample.sample_id == first and sample.group_id < self.spec.show:
                    shown.append(replace(sample, score=result.value))
        gathered = self.world.gather((rows, failures))
        problems = [text for _, part in gathered for text in part]
        if problems:
            raise RewardError(f"evaluation: {len(problems)} samples failed their reward; the first: {problems[0]}")
        samples = [sample for part in self.world.gather_main(shown) for sample in part]
        return _evaluation(
            questions=tuple(prompt.question() for prompt in prompts),
            rows=[row for part, _ in gathered for row in part],
            samples=samples,
        )


def _evaluation(questions: tuple[str, ...], rows: Sequence[_Row], samples: Sequence[Sample]) -> Evaluation:
    by_prompt: dict[int, list[_Row]] = {}
    for row in sorted(rows, key=lambda row: row.sample_id):
        by_prompt.setdefault(row.group_id, []).append(row)
    assert sorted(by_prompt) == list(range(len(questions))), "every prompt has a sample"
    groups = [by_prompt[i] for i in range(len(questions))]
    names = list(groups[0][0].rewards)
    return Evaluation(
        questions=questions,
        scores=tuple(_mean([row.score for row in group]) for group in groups),
        rewards={name: _mean([_mean([row.rewards[name] for row in group]) for group in groups]) for name in names},
        texts=tuple(group[0].text for group in groups),
        samples=tuple(sorted(samples, key=lambda sample: sample.sample_id)),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def paired_test(before: Sequence[float], after: Sequence[float]) -> PairedTest:
    """Compare scores of the same prompts, two-sided."""
    better = sum(b > a for a, b in zip(before, after, strict=True))
    worse = sum(b < a for a, b in zip(before, after, strict=True))
    changed = better + worse
    tail = sum(math.comb(changed, k) for k in range(min(better, worse) + 1)) / 2**changed
    return PairedTest(
        better=better, worse=worse, ties=len(before) - changed, p_value=min(1.0, 2 * tail) if changed else 1.0
    )
