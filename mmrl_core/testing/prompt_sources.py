"""`PromptSourceConformance`: what the core relies on in a source of prompts. Imports no torch."""

from __future__ import annotations

import json
from typing import ClassVar

import pytest

from mmrl_core.contracts import Prompt, PromptSource
from mmrl_core.plugins import Selected
from mmrl_core.testing.components import ComponentConformance


def described(prompt: Prompt) -> str:
    """A prompt without its position, as comparable text."""
    return json.dumps(
        [list(map(dict, prompt.messages or ())), prompt.text, prompt.answer, dict(prompt.columns), prompt.origin],
        default=str,
        sort_keys=True,
    )


class PromptSourceConformance(ComponentConformance):
    """Subclass it as `Test...` and name the `component`; a source that reads files overrides `make_options`."""

    kind = "prompt source"
    shuffles: ClassVar[bool] = True
    """Whether each epoch has its own order and the seed changes it."""

    @classmethod
    def open(cls, selected: Selected, seed: int = 0) -> PromptSource:
        """A prepared source."""
        source: PromptSource = selected.create(seed)
        source.prepare()
        return source

    @pytest.fixture(scope="class")
    @classmethod
    def chosen(cls, tmp_path_factory: pytest.TempPathFactory) -> Selected:
        """The component with its options, where it is available."""
        cls.require_available()
        return cls.selected(cls.make_options(tmp_path_factory.mktemp("conformance")))

    @pytest.fixture(scope="class")
    @classmethod
    def source(cls, chosen: Selected) -> PromptSource:
        """A prepared source."""
        return cls.open(chosen)

    def test_prompts_are_well_formed(self, source: PromptSource) -> None:
        """Exactly one of a chat and a text, a question to show, an origin that error messages name, and the index."""
        assert len(source) > 0, "an empty source raises DataError in prepare"
        for index in range(min(len(source), 50)):
            prompt = source.prompt(index)
            assert prompt.index == index
            assert (prompt.messages is None) != (prompt.text is None)
            assert prompt.question().strip()
            assert prompt.origin.strip()
            for message in prompt.messages or ():
                assert isinstance(message["role"], str)
                assert isinstance(message["content"], str)

    def test_prompts_can_be_sent_to_reward_workers(self, source: PromptSource) -> None:
        """Answers and columns are plain data: samples are pickled."""
        import pickle

        prompt = source.prompt(0)
        assert described(pickle.loads(pickle.dumps(prompt))) == described(prompt)  # noqa: S301 - just pickled here

    def test_prompt_is_a_function_of_its_index(self, source: PromptSource, chosen: Selected) -> None:
        """Resuming is exact because `prompt(i)` depends on nothing that was asked before: any order, another object."""
        indices = [*range(min(2 * len(source), 60)), 10 * len(source), 7]
        forward = [described(source.prompt(i)) for i in indices]
        backward = [described(source.prompt(i)) for i in reversed(indices)][::-1]
        assert backward == forward
        assert [described(self.open(chosen).prompt(i)) for i in indices[-3:]] == forward[-3:]

    def test_an_epoch_visits_every_prompt_once(self, source: PromptSource) -> None:
        """Epochs follow each other without end, each a permutation of the same rows."""
        size = len(source)
        if size > 5000:
            pytest.skip(f"an epoch has {size} prompts; check with smaller options")
        epochs = [[described(source.prompt(i)) for i in range(e * size, (e + 1) * size)] for e in range(3)]
        assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
        assert len({source.prompt(i).origin for i in range(size)}) == size, "origins name rows, one each"
        if self.shuffles and size > 8:
            assert epochs[0] != epochs[1], "every epoch has its own order"

    def test_seed_changes_the_order(self, source: PromptSource, chosen: Selected) -> None:
        """Two seeds are two experiments."""
        if not self.shuffles or len(source) <= 8:
            pytest.skip("it does not shuffle")
        other = self.open(chosen, seed=1)
        count = min(len(source), 50)
        assert [described(source.prompt(i)) for i in range(count)] != [described(other.prompt(i)) for i in range(count)]

    def test_digest_names_data_and_order(self, source: PromptSource, chosen: Selected) -> None:
        """Ranks compare it before the first step, and a resumed run with its checkpoint."""
        digest = source.digest()
        assert isinstance(digest, str)
        assert len(digest) >= 8
        assert self.open(chosen).digest() == digest
        if self.shuffles:
            assert self.open(chosen, seed=1).digest() != digest, "another order, the same digest"
