from __future__ import annotations

from typing import Any

import pytest
from mmrl_reward_brevity import plugin
from mmrl_reward_brevity.options import BrevityOptions
from mmrl_reward_brevity.rewards import Brevity, distinct
from pydantic import ValidationError

from mmrl_core import RewardResult, Sample
from mmrl_core.contracts import Prompt


def sample(text: str | None) -> Sample:
    return Sample(sample_id=0, group_id=0, prompt=Prompt(index=0, text="q"), text=text)


def test_the_plugin_declares_what_the_readme_names() -> None:
    assert plugin.mmrl_api == 1
    assert [c.name for c in plugin.mmrl_rewards()] == ["brevity", "distinct"]


@pytest.mark.parametrize(("words", "value"), [(0, 0.0), (1, 1.0), (10, 1.0), (15, 0.5), (20, 0.25)])
def test_brevity_halves(words: int, value: float) -> None:
    reward = Brevity(BrevityOptions(free_words=10, half_life_words=5))
    assert reward.score([sample("word " * words)]) == [RewardResult(value=value, scores={"words": float(words)})]


@pytest.mark.parametrize(
    ("text", "value"),
    [("", 1.0), ("a b", 1.0), ("a b c d", 1.0), ("a a a a a", 1 / 3), ("a b c a b c", 3 / 4)],
)
def test_distinct_counts_runs_of_three(text: str, value: float) -> None:
    assert distinct(sample(text)) == value


def test_a_sample_without_text_has_failed() -> None:
    for reward in (Brevity(BrevityOptions()), distinct.create(None)):
        (result,) = reward.score([sample(None)])
        assert result.value is None
        assert "no text" in (result.failure or "")


@pytest.mark.parametrize("bad", [{"half_life_words": 0}, {"free_words": -1}, {"free_word": 1}])
def test_bad_options_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        BrevityOptions(**bad)
