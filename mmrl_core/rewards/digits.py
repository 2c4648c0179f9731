"""`digits` and `digits_judge`: what two independent classifiers of 8 x 8 digits see in an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from mmrl_core.contracts import Reward, RewardResult, Sample
from mmrl_core.digits.classifier import DigitClassifier, load_classifier, one_thread
from mmrl_core.digits.images import SIZE
from mmrl_core.errors import RewardError
from mmrl_core.rewards.options import DigitsJudgeOptions, DigitsRewardOptions


class DigitsReward(Reward):
    """Of the prompted digit (the prompt's answer): its probability, or whether it is the likeliest."""

    classifier: ClassVar[Literal["reward", "judge"]] = "reward"
    batch_size = 1024
    options: DigitsRewardOptions | DigitsJudgeOptions

    def setup(self, device: str) -> None:
        """Load the classifier; on first use train it, on the CPU. It computes there whatever `device` is: it takes less
        time than moving the images. Raises DataError without scikit-learn, ModelError when the cached weights are
        unusable."""
        self._classifier: DigitClassifier = load_classifier(self.classifier)

    @torch.no_grad()
    def score(self, samples: Sequence[Sample]) -> list[RewardResult]:
        """One result a sample, all in one batch; a sample that is no 8 x 8 image of a digit has failed."""
        results: list[RewardResult] = [RewardResult(failure="not scored")] * len(samples)
        usable: list[tuple[int, int, Any]] = []
        for place, sample in enumerate(samples):
            try:
                usable.append((place, _digit(sample), _grey(sample)))
            except RewardError as error:
                results[place] = RewardResult(failure=str(error))
        if not usable:
            return results
        pixels = torch.from_numpy(np.stack([image for _, _, image in usable])).unsqueeze(1)
        with one_thread():
            probabilities = self._classifier(pixels).softmax(-1)
        for (place, digit, _), row in zip(usable, probabilities, strict=True):
            likely = float(row[digit])
            value = likely if self.options.score == "probability" else float(likely == float(row.max()))
            results[place] = RewardResult(value=value)
        return results


class DigitsJudge(DigitsReward):
    """The same by the second classifier, for evaluation: what is learned from the first must convince it too."""

    classifier = "judge"


def _digit(sample: Sample) -> int:
    answer = str(sample.answer)
    if answer not in map(str, range(10)):
        raise RewardError(f"{sample.prompt.origin}: the reference answer {sample.answer!r} is no digit from 0 to 9")
    return int(answer)


def _grey(sample: Sample) -> Any:
    """fp32 array [8, 8] in [-1, 1]: the mean over colours."""
    if sample.image is None:
        raise RewardError("the sample has no image; this reward scores images of digits only")
    if sample.image.shape != (SIZE, SIZE, 3):
        shape = " x ".join(map(str, sample.image.shape[:2]))
        raise RewardError(f"the image has {shape} pixels; this reward scores images of {SIZE} x {SIZE} only")
    return sample.image.astype(np.float32).mean(-1) / np.float32(127.5) - np.float32(1)
