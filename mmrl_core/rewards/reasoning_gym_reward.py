"""`reasoning_gym`: scores with the verifier of the reasoning-gym task that made the prompt."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmrl_core.contracts import Reward, RewardResult, Sample
from mmrl_core.errors import RewardError
from mmrl_core.rewards.options import ReasoningGymRewardOptions

_CURE = 'pip install "mmrl-core[reasoning-gym]"'


class ReasoningGymReward(Reward):
    """The task's own score in [0, 1].

    The verifier is handed the task's entry: the prompt's column `entry` (what the prompt source `reasoning_gym`
    gives), or one made of the question, the reference answer and the column `metadata` (a mapping, or JSON of one).
    """

    options: ReasoningGymRewardOptions

    def __init__(self, options: ReasoningGymRewardOptions) -> None:
        super().__init__(options)
        self._verifiers: dict[str, Callable[[str | None, dict[str, Any]], float]] = {}

    def setup(self, device: str) -> None:
        """Import reasoning-gym; find the verifier of `dataset` when the options name one. Raises RewardError."""
        try:
            import reasoning_gym  # noqa: F401
        except ImportError as error:
            raise RewardError(f"reward 'reasoning_gym' needs reasoning-gym ({error}). Cure: {_CURE}") from error
        if self.options.dataset is not None:
            self._verifier(self.options.dataset)

    def score(self, samples: Sequence[Sample]) -> list[RewardResult]:
        """One result a sample; a sample whose task is unknown, or whose verifier raises, has failed."""
        return [self._score_one(sample) for sample in samples]

    def _score_one(self, sample: Sample) -> RewardResult:
        if sample.text is None:
            return RewardResult(failure="the sample has no text; reasoning_gym scores text policies only")
        try:
            entry = _entry(sample)
            verifier = self._verifier(self._dataset(sample, entry["metadata"]))
        except RewardError as error:
            return RewardResult(failure=str(error))
        try:
            value = verifier(self._answer(sample.text), entry)
        except Exception as error:  # noqa: BLE001 - a task's verifier raises what it likes; it fails this sample
            return RewardResult(failure=f"its verifier raised {type(error).__name__}: {error}")
        return RewardResult(value=float(value))

    def _answer(self, text: str) -> str | None:
        tag = self.options.answer_tag
        if tag is None:
            return text
        found: list[str] = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        return found[-1].strip() if found else None

    def _dataset(self, sample: Sample, metadata: Mapping[str, Any]) -> str:
        columns = sample.prompt.columns
        name = self.options.dataset or columns.get("dataset") or metadata.get("source_dataset")
        if not isinstance(name, str):
            where = sample.prompt.origin or f"prompt {sample.prompt.index}"
            raise RewardError(
                f"{where} does not say which task made it. Cure: the reward's option `dataset`, or a column `dataset` "
                "in the data"
            )
        return name

    def _verifier(self, name: str) -> Callable[[str | None, dict[str, Any]], float]:
        if name not in self._verifiers:
            from reasoning_gym import get_score_answer_fn

            try:
                self._verifiers[name] = get_score_answer_fn(name)
            except ValueError as error:
                raise RewardError(f"reasoning-gym has no task {name!r}: {error}") from error
        return self._verifiers[name]


def _entry(sample: Sample) -> dict[str, Any]:
    entry = sample.prompt.columns.get("entry")
    if isinstance(entry, Mapping):
        return {"metadata": {}, **entry}
    return {"question": sample.prompt.question(), "answer": sample.answer, "metadata": _metadata(sample)}


def _metadata(sample: Sample) -> dict[str, Any]:
    raw = sample.prompt.columns.get("metadata", {})
    if isinstance(raw, str):
        try:
            raw = json.loads(raw)
        except ValueError as error:
            raise RewardError(f"column `metadata` is not JSON: {error}") from error
    if not isinstance(raw, Mapping):
        raise RewardError(f"column `metadata` is a {type(raw).__name__}; it must be a mapping")
    return dict(raw)
