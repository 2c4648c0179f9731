from __future__ import annotations

import pytest
from mmrl_changeme import plugin
from mmrl_changeme.options import Options
from mmrl_changeme.rewards import changeme

from mmrl_core import Sample
from mmrl_core.contracts import Prompt


def sample(text: str | None) -> Sample:
    return Sample(sample_id=0, group_id=0, prompt=Prompt(index=0, text="question", answer="reference"), text=text)


def test_it_declares_the_reward() -> None:
    assert [c.name for c in plugin.mmrl_rewards()] == ["changeme"]


@pytest.mark.parametrize(("text", "value"), [("yes please", 1.0), ("yes", 0.0)])
def test_it_scores(text: str, value: float) -> None:
    assert changeme(sample(text), Options(word="please")) == value


def test_without_text_the_sample_has_failed() -> None:
    (result,) = changeme.create(Options()).score([sample(None)])
    assert result.value is None
    assert result.failure == "ValueError: the sample has no text"
