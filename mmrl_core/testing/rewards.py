"""`RewardConformance`: what the core relies on in a reward. Imports no torch."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import pytest

from mmrl_core.contracts import Prompt, Reward, RewardResult, Sample
from mmrl_core.plugins import Selected
from mmrl_core.recipe import RewardChoice
from mmrl_core.rewards.checks import check_results
from mmrl_core.rewards.creation import create_reward
from mmrl_core.rewards.executor import RewardExecutor, Scored
from mmrl_core.testing.components import ComponentConformance, mismatches


def text_sample(text: str | None, answer: object = "42", *, sample_id: int = 0, length: int | None = None) -> Sample:
    """A sample of text. `length` is its number of tokens; by default its number of words."""
    return Sample(
        sample_id=sample_id,
        group_id=sample_id // 2,
        prompt=Prompt(index=sample_id // 2, text="What is 40 + 2?", answer=answer, origin=f"check:{sample_id}"),
        text=text,
        length=len((text or "").split()) if length is None else length,
    )


TEXTS = (
    "42",
    "The answer is 42.",
    "43",
    "",
    "no number at all",
    "<think>40 + 2</think><answer>42</answer>",
    r"So it is $\boxed{42}$.",
    "4" * 300,
    "∞ ≠ 42 \N{GRINNING FACE} \x00",
    "word " * 500,
)
"""Right, wrong, empty, long and odd answers to one question."""


def picture_sample(*shape: int, question: str = "a red dog on a beach", sample_id: int = 0) -> Sample:
    """A sample of noise: an image of `shape` (H, W), or a video of `shape` (frames, H, W). Its id is its seed."""
    pixels = np.random.default_rng(sample_id).integers(0, 256, (*shape, 3), dtype=np.uint8)
    return Sample(
        sample_id=sample_id,
        group_id=sample_id // 2,
        prompt=Prompt(index=sample_id // 2, text=question, origin=f"check:{sample_id}"),
        image=pixels if len(shape) == 2 else None,
        video=pixels if len(shape) == 3 else None,
        length=8,
    )


IMAGES = tuple(
    picture_sample(height, width, sample_id=i)
    for i, (height, width) in enumerate([(64, 64), (40, 64), (97, 33), (1, 1), (64, 64)])
)
"""For `samples` of an image reward: square, wide, tall and tiny."""

VIDEOS = tuple(
    picture_sample(frames, height, width, sample_id=10 + i)
    for i, (frames, height, width) in enumerate([(5, 32, 32), (1, 24, 40), (9, 40, 24)])
)
"""For `samples` of a video reward: several frames, one frame, several shapes."""


class RewardConformance(ComponentConformance):
    """Subclass it as `Test...`; name the `component` (its word, or the Component when it is not installed). A reward
    that needs files overrides `make_options`."""

    kind = "reward"
    samples: ClassVar[Sequence[Sample]] = tuple(text_sample(text, sample_id=i) for i, text in enumerate(TEXTS))
    """What to score; the reference answer of the defaults is "42"."""
    expected: ClassVar[Sequence[float | None]] = ()
    """The values of `samples`, None for a failure; empty: not compared."""
    device: ClassVar[str] = "cpu"
    """Torch device string given to `setup`."""
    deterministic: ClassVar[bool] = True
    """The same sample always gets the same value, whatever is scored with it."""
    tolerance: ClassVar[float] = 1e-6
    """Largest difference between two values of one sample; batches change the rounding of reward models."""

    @pytest.fixture(scope="class")
    @classmethod
    def chosen(cls, tmp_path_factory: pytest.TempPathFactory) -> Selected:
        """The component with its options, where it is available."""
        cls.require_available()
        return cls.selected(cls.make_options(tmp_path_factory.mktemp("conformance")))

    @pytest.fixture(scope="class")
    @classmethod
    def reward(cls, chosen: Selected) -> Iterator[Reward]:
        """The reward, created and set up as in a run."""
        made = create_reward(chosen)
        made.setup(cls.device)
        made.onload()
        yield made
        made.offload()

    def test_one_result_a_sample(self, reward: Reward) -> None:
        """Results are matched by position: a sequence, as long as the samples, of RewardResult; each is a finite value
        or a failure with a reason, never both; a failure is never a number."""
        answer = reward.score(self.samples)
        results = check_results(answer, len(self.samples))
        for position, (given, result) in enumerate(zip(answer, results, strict=True)):
            if given.value is not None:
                assert math.isfinite(given.value), f"sample {position}: value {given.value}; return a failure instead"
            if result.failure is not None:
                assert result.failure.strip(), f"sample {position}: a failure says why"

    def test_values_are_the_expected_ones(self, reward: Reward) -> None:
        """What the class states as `expected`."""
        if not self.expected:
            pytest.skip("the class states no expected values")
        assert len(self.expected) == len(self.samples), "one expected value a sample"
        results = check_results(reward.score(self.samples), len(self.samples))
        for position, (result, value) in enumerate(zip(results, self.expected, strict=True)):
            assert result.value == (None if value is None else pytest.approx(value)), f"sample {position}: {result}"

    def test_no_samples_no_results(self, reward: Reward) -> None:
        """An engine replica may have nothing to score."""
        assert list(reward.score([])) == []

    def test_order_and_batches_do_not_matter(self, reward: Reward) -> None:
        """Samples arrive in any order and in batches of any size."""
        if not self.deterministic:
            pytest.skip("the class says that it is not deterministic")
        together = self._values(reward.score(self.samples))
        assert self._close(self._values(reward.score(self.samples)), together), "scored twice"
        backwards = self._values(reward.score(self.samples[::-1]))[::-1]
        assert self._close(backwards, together), mismatches(list(zip(backwards, together, strict=True)))
        alone = [value for sample in self.samples for value in self._values(reward.score([sample]))]
        assert self._close(alone, together), mismatches(list(zip(alone, together, strict=True)))

    def test_sub_scores_are_plain_numbers(self, reward: Reward) -> None:
        """Sub-scores become metrics: names without `/` at the ends, the same names for every sample with a value."""
        results = check_results(reward.score(self.samples), len(self.samples))
        for result in results:
            for name in result.scores:
                assert name.strip("/ ") == name
                assert name, "a sub-score has a name"

    def test_batch_size_is_positive(self, reward: Reward) -> None:
        """The core cuts batches of this size unless the recipe says otherwise."""
        assert isinstance(reward.batch_size, int)
        assert reward.batch_size >= 1

    def test_offload_and_onload_in_turn(self, reward: Reward) -> None:
        """The core brings weights in before scoring and releases them after, every step."""
        before = self._values(reward.score(self.samples))
        reward.offload()
        reward.onload()
        assert not self.deterministic or self._close(self._values(reward.score(self.samples)), before)

    def test_options_survive_pickling(self, chosen: Selected) -> None:
        """Options are data."""
        options = chosen.options
        assert pickle.loads(pickle.dumps(options)) == options  # noqa: S301 - just pickled here

    def test_worker_gives_the_same_results(self, reward: Reward, chosen: Selected) -> None:
        """By default a reward runs in a worker process that may be killed: it is set up there from its word and
        options, gets pickled samples, and says the same as in this process."""
        inline = self._values(reward.score(self.samples))
        scored = self._execute("worker", chosen, self.samples)
        values = [one.value for one in scored]
        assert not self.deterministic or self._close(values, inline), mismatches(list(zip(values, inline, strict=True)))
        assert all((one.value is None) == (one.failure is not None) for one in scored)

    def test_a_sample_of_another_kind_is_no_number(self, chosen: Selected) -> None:
        """A sample without text, image, video or answer is failed or scored; the run goes on either way."""
        empty = Sample(sample_id=0, group_id=0, prompt=Prompt(index=0, text="?", origin="check:empty"))
        (scored,) = self._execute("inline", chosen, [empty])
        assert (scored.value is None) == (scored.failure is not None)

    def _execute(self, run: str, chosen: Selected, samples: Sequence[Sample]) -> list[Scored]:
        """Score through the executor, as a run does."""
        choice = RewardChoice.model_validate({"name": chosen.found.name, "run": run, "device": self.device})
        with RewardExecutor([choice], [chosen], self.device) as executor:
            executor.setup()
            return executor.score(samples)

    def _values(self, results: Sequence[RewardResult]) -> list[float | None]:
        return [result.value for result in check_results(results, len(results))]

    def _close(self, left: Sequence[float | None], right: Sequence[float | None]) -> bool:
        known = [value for value in right if value is not None]
        return [value is None for value in left] == [value is None for value in right] and [
            value for value in left if value is not None
        ] == pytest.approx(known, abs=self.tolerance, rel=self.tolerance)
