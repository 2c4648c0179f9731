"""The rewards: a class with options, and a decorated function."""

from __future__ import annotations

from collections.abc import Sequence

from mmrl_core import Reward, RewardResult, Sample, reward
from mmrl_reward_brevity.options import BrevityOptions


class Brevity(Reward):
    """1 up to `free_words` words, then halved every `half_life_words` further words; 0 for an empty text."""

    options: BrevityOptions

    def score(self, samples: Sequence[Sample]) -> list[RewardResult]:
        """One result a sample, in order."""
        return [self._score_one(sample) for sample in samples]

    def _score_one(self, sample: Sample) -> RewardResult:
        if sample.text is None:
            return RewardResult(failure="the sample has no text")
        words = len(sample.text.split())
        excess = max(0, words - self.options.free_words)
        value = 0.5 ** (excess / self.options.half_life_words) if words else 0.0
        return RewardResult(value=value, scores={"words": float(words)})


@reward
def distinct(sample: Sample) -> float:
    """The share of the text's runs of three words that are distinct; 1 when there is no such run."""
    if sample.text is None:
        raise ValueError("the sample has no text")
    words = sample.text.split()
    runs = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(runs)) / len(runs) if runs else 1.0
