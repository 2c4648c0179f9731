from __future__ import annotations

import importlib.util
import json
import sys
from typing import Any

import pytest

from mmrl_core.contracts import Prompt, RewardResult, Sample
from mmrl_core.errors import RewardError
from mmrl_core.rewards.options import ReasoningGymRewardOptions
from mmrl_core.rewards.reasoning_gym_reward import ReasoningGymReward

needs_the_extra = pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="needs the extra")


def score(text: str, entry: dict[str, Any], columns: dict[str, Any], **options: Any) -> RewardResult:
    prompt = Prompt(index=0, text=entry["question"], answer=entry["answer"], columns=columns, origin="task 5")
    reward = ReasoningGymReward(ReasoningGymRewardOptions(**options))
    reward.setup("cpu")
    (result,) = reward.score([Sample(sample_id=0, group_id=0, prompt=prompt, text=text)])
    return result


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(RewardError, match=r'pip install "mmrl-core\[reasoning-gym\]"'):
        ReasoningGymReward(ReasoningGymRewardOptions()).setup("cpu")


@needs_the_extra
@pytest.mark.parametrize("task", ["chain_sum", "countdown", "leg_counting"])
def test_the_tasks_own_verifier_scores(task: str) -> None:
    import reasoning_gym

    for entry in reasoning_gym.create_dataset(task, size=3, seed=1):
        right = entry["metadata"].get("solution") or entry["answer"]
        right = str(right) if task == "countdown" else entry["answer"]
        for columns in (
            {"entry": entry, "dataset": task},
            {"metadata": json.dumps(entry["metadata"], default=str), "dataset": task},
            {"metadata": {**entry["metadata"], "source_dataset": task}},
        ):
            assert score(f"so <answer> {right} </answer>", entry, columns).value == 1.0
            wrong = score("so <answer>999999</answer>", entry, columns).value
            assert wrong is not None
            assert wrong < 0.5
        assert score(right, entry, {"entry": entry}, dataset=task, answer_tag=None).value == 1.0


@needs_the_extra
def test_no_tag_no_task_wrong_task() -> None:
    entry = {"question": "1+1", "answer": "2", "metadata": {}}
    assert score("2", entry, {"entry": entry, "dataset": "chain_sum"}).value == 0.0
    nameless = score("<answer>2</answer>", entry, {"entry": entry})
    assert nameless.value is None
    assert "task 5 does not say which task made it" in (nameless.failure or "")
    unknown = score("<answer>2</answer>", entry, {"entry": entry, "dataset": "chain_sums"})
    assert "no task 'chain_sums'" in (unknown.failure or "")
    with pytest.raises(RewardError, match="no task 'nope'"):
        score("2", entry, {}, dataset="nope")
    bad = score("<answer>2</answer>", entry, {"metadata": "{", "dataset": "chain_sum"})
    assert "`metadata` is not JSON" in (bad.failure or "")
