"""Engine checks: which tokens come out. The reference is transformers' own forward on the sampled rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmrl_core.contracts import Rollouts
from mmrl_core.rows import select_rows
from mmrl_core.testing.engine_stage import EngineStage, Studio
from mmrl_core.testing.texts import plain_logits

SLACK = 1e-4
"""Relative slack of probabilities at a cut: the engine and the reference round differently."""


def probabilities(studio: Studio, rollouts: Rollouts, temperature: float) -> list[Tensor]:
    """[R, V] a row: what the full softmax at this temperature says at each sampled position."""
    rows = zip(rollouts.payload["prompt_ids"], rollouts.payload["response_ids"], strict=True)
    with torch.no_grad():
        return [(plain_logits(studio.plain, p, r) / (temperature or 1.0)).softmax(-1) for p, r in rows]


def chosen(rollouts: Rollouts, probability: list[Tensor]) -> list[Tensor]:
    """[R] a row: the probability of each sampled token."""
    ids = rollouts.payload["response_ids"]
    return [p.gather(-1, r[:, None])[:, 0] for p, r in zip(probability, ids, strict=True)]


class SamplingChecks(EngineStage):
    """See RolloutEngineConformance."""

    def test_greedy_takes_the_likeliest_token(self, studio: Studio) -> None:
        """Evaluation is greedy: temperature 0 means the likeliest token, whatever the seed."""
        rollouts = studio.engine.generate(studio.requests(2, 2), studio.sampling(temperature=0.0))
        probability = probabilities(studio, rollouts, 0.0)
        for p, token in zip(probability, chosen(rollouts, probability), strict=True):
            assert (token >= p.amax(-1) * (1 - SLACK)).all(), "a token that is not the likeliest"
        ids = rollouts.payload["response_ids"]
        assert torch.equal(ids[0], ids[1]), "greedy samples of one prompt differ"

    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    def test_tokens_follow_the_distribution(self, studio: Studio, temperature: float) -> None:
        """Policy gradients are unbiased only when samples come from the distribution whose log-probs are trained:
        a chi-square test of many first tokens of one prompt, fixed seeds."""
        count = 2000
        sampling = studio.sampling(temperature=temperature, max_new_tokens=1)
        rollouts = studio.engine.generate(studio.requests(1, count), sampling)
        expected = probabilities(studio, select_rows(rollouts, [0]), temperature)[0][0].double() * count
        first = torch.stack([ids[0] for ids in rollouts.payload["response_ids"]])
        observed = torch.bincount(first, minlength=len(expected)).double()
        often = expected >= 5
        observed = torch.cat([observed[often], observed[~often].sum()[None]])
        expected = torch.cat([expected[often], expected[~often].sum()[None]])
        assert len(expected) > 10, "the tiny model's distribution has too few likely tokens for this check"
        statistic = float(((observed - expected).square() / expected).sum())
        freedom = len(expected) - 1
        # Wilson and Hilferty: the cube root of chi-square / freedom is nearly normal
        deviation = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
        assert deviation < 4.5, f"chi-square {statistic:.0f} with {freedom} degrees of freedom: {deviation:.1f} sigma"

    def test_top_k_keeps_to_the_likeliest(self, studio: Studio) -> None:
        """top_k 4: every token is among the 4 likeliest."""
        rollouts = studio.engine.generate(studio.requests(3, 4), studio.sampling(temperature=1.0, top_k=4))
        probability = probabilities(studio, rollouts, 1.0)
        for p, token in zip(probability, chosen(rollouts, probability), strict=True):
            assert (token >= p.topk(4).values[:, -1] * (1 - SLACK)).all()

    def test_top_p_keeps_to_the_nucleus(self, studio: Studio) -> None:
        """top_p 0.5: the tokens likelier than the sampled one have together less than half of the probability."""
        rollouts = studio.engine.generate(studio.requests(3, 4), studio.sampling(temperature=1.0, top_p=0.5))
        probability = probabilities(studio, rollouts, 1.0)
        for p, token in zip(probability, chosen(rollouts, probability), strict=True):
            likelier = torch.where(p > token[:, None], p, 0.0).sum(-1)
            assert (likelier < 0.5 + SLACK).all()

    def test_min_p_leaves_out_the_unlikely(self, studio: Studio) -> None:
        """min_p 0.3: no token is less than 0.3 times as likely as the likeliest."""
        rollouts = studio.engine.generate(studio.requests(3, 4), studio.sampling(temperature=1.0, min_p=0.3))
        probability = probabilities(studio, rollouts, 1.0)
        for p, token in zip(probability, chosen(rollouts, probability), strict=True):
            assert (token >= 0.3 * p.amax(-1) * (1 - SLACK)).all()

    def test_different_seeds_give_different_samples(self, studio: Studio) -> None:
        """A group of equal samples has no advantages."""
        rollouts = studio.engine.generate(studio.requests(1, 8), studio.sampling())
        distinct = {tuple(ids.tolist()) for ids in rollouts.payload["response_ids"]}
        assert len(distinct) >= 7, f"8 seeds gave {len(distinct)} different samples"
