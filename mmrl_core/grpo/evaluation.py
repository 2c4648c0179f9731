"""Held-out evaluation: the same rewards on prompts that training does not draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmrl_core.contracts import GenerationRequest, Policy, Prompt, PromptSource, RolloutEngine
from mmrl_core.errors import RewardError
from mmrl_core.grpo.collect import score_everywhere, seed_of, take_prompts
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
    texts: tuple[str, ...]
    """The first sample of each prompt."""

    @property
    def mean(self) -> float:
        """Mean over prompts."""
        return sum(self.scores) / len(self.scores)


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
        local: list[tuple[int, float, str]] = []
        failures: list[str] = []
        for start in range(0, len(prompts), at_once):
            requests = [self._request(i, prompts[i]) for i in range(start, min(start + at_once, len(prompts)))]
            rollouts = self.engine.generate(requests[replica.index :: replica.count], self.sampling)
            scored = score_everywhere(self.rewards, self.engine, self.world, rollouts.samples)
            for sample, result in zip(rollouts.samples, scored, strict=False):  # scored on replica roots only
                if result.value is None:
                    failures.append(f"{sample.prompt.origin}: {result.failure}")
                else:
                    local.append((sample.group_id, result.value, sample.text or ""))
        gathered = self.world.gather((local, failures))
        problems = [text for _, part in gathered for text in part]
        if problems:
            raise RewardError(f"evaluation: {len(problems)} samples failed their reward; the first: {problems[0]}")
        by_prompt: dict[int, list[tuple[float, str]]] = {}
        for group, value, text in sorted(row for part, _ in gathered for row in part):
            by_prompt.setdefault(group, []).append((value, text))
        order = sorted(by_prompt)
        return Evaluation(
            questions=tuple(prompts[i].question() for i in order),
            scores=tuple(sum(v for v, _ in by_prompt[i]) / len(by_prompt[i]) for i in order),
            texts=tuple(by_prompt[i][0][1] for i in order),
        )

    def _request(self, index: int, prompt: Prompt) -> GenerationRequest:
        ids = tuple(range(index * self.spec.samples_per_prompt, (index + 1) * self.spec.samples_per_prompt))
        seeds = tuple(seed_of(self.seed, 0, i) for i in ids)  # step 0: no training step shares these
        return GenerationRequest(prompt=prompt, group_id=index, sample_ids=ids, seeds=seeds)


def paired_test(before: Sequence[float], after: Sequence[float]) -> PairedTest:
    """Compare scores of the same prompts, two-sided."""
    better = sum(b > a for a, b in zip(before, after, strict=True))
    worse = sum(b < a for a, b in zip(before, after, strict=True))
    changed = better + worse
    tail = sum(math.comb(changed, k) for k in range(min(better, worse) + 1)) / 2**changed
    return PairedTest(
        better=better, worse=worse, ties=len(before) - changed, p_value=min(1.0, 2 * tail) if changed else 1.0
    )
