"""The reward. Runs in a worker process, or inline; see the recipe's `run`."""

from __future__ import annotations

from mmrl_changeme.options import Options
from mmrl_core import Sample, reward


@reward
def changeme(sample: Sample, options: Options) -> float:
    """CHANGEME: 1 when the text holds the word, else 0.

    Return a number, a mapping with "score" and named sub-scores, or a RewardResult. Raising makes the sample *failed*,
    which is not 0. For a reward that loads a model, subclass `mmrl_core.Reward` instead and load it in `setup`.
    """
    if sample.text is None:
        raise ValueError("the sample has no text")
    return float(options.word in sample.text)
