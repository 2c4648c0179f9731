from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from mmrl_core import RewardResult, reward
from mmrl_core.contracts import Prompt, Reward, Sample
from mmrl_core.errors import PluginError, RewardError
from mmrl_core.hookspecs import Component
from mmrl_core.plugins import Found, Selected
from mmrl_core.rewards.creation import create_reward
from mmrl_core.rewards.function import RewardFunction
from mmrl_core.rewards.runners import describe_status, worker_environment

SAMPLE = Sample(sample_id=0, group_id=0, prompt=Prompt(index=0, text="q"), text="t")


def only(function: Any, options: Any = None) -> RewardResult:
    (result,) = reward(function).create(options).score([SAMPLE])
    assert isinstance(result, RewardResult)
    return result


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.array(0.5), {"score": 0.5}, RewardResult(value=0.5)])
def test_accepted_answers(value: Any) -> None:
    assert only(lambda sample: value).value == 0.5


def test_sub_scores_options_and_batch_size() -> None:
    assert only(lambda sample: {"score": 1, "part": True}).scores == {"part": 1.0}
    assert only(lambda sample, options: options * 2, 3).value == 6.0

    @reward(batch_size=7)
    def decorated(sample: Sample) -> float:
        """Its words."""
        return 1.0

    assert isinstance(decorated, RewardFunction)
    assert decorated(SAMPLE) == 1.0
    assert (decorated.__name__, decorated.__doc__) == ("decorated", "Its words.")
    assert decorated.create(None).batch_size == 7


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "a value of type NoneType"),
        ("0.5", "a value of type str"),
        ([0.5], "a value of type list"),
        ({"score": "high"}, "'score' of type str"),
        ({"score": 1, "part": None}, "sub-score 'part' of type NoneType"),
        ({"value": 1}, "mapping without 'score'"),
    ],
)
def test_rejected_answers_fail_their_sample(value: Any, reason: str) -> None:
    result = only(lambda sample: value)
    assert result.value is None
    assert reason in (result.failure or "")


def test_an_exception_fails_its_sample_only() -> None:
    def sometimes(sample: Sample) -> float:
        return float("no") if sample.sample_id == 1 else 1.0

    two = [Sample(sample_id=i, group_id=0, prompt=SAMPLE.prompt) for i in (1, 2)]
    results = reward(sometimes).create(None).score(two)
    assert [r.failure for r in results] == ["ValueError: could not convert string to float: 'no'", None]


def test_unusable_functions_are_rejected_where_they_are_defined() -> None:
    with pytest.raises(RewardError, match=r"takes \(sample\) or \(sample, options\)"):
        reward(lambda: 1.0)

    async def later(sample: Sample) -> float:
        return 1.0

    with pytest.raises(RewardError, match="not async"):
        reward(later)
    with pytest.raises(RewardError, match="batch_size is 0"):
        reward(lambda sample: 1.0, batch_size=0)


class Whole(Reward):
    def score(self, samples: Any) -> Any:
        return [RewardResult(value=self.options) for _ in samples]


class Unfinished(Reward):
    pass


whole_function = reward(lambda sample, options: options)


def plain(sample: Sample) -> float:
    return 1.0


number = 5


def selected(name: str) -> Selected:
    component = Component(name="one", summary="", target=f"{__name__}:{name}")
    return Selected(found=Found(kind="reward", component=component, distribution="dist", version="3"), options=4.0)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or sys.modules["test_reward_functions"])


@pytest.mark.parametrize("name", ["Whole", "whole_function"])
def test_classes_and_functions_are_created_with_options(name: str) -> None:
    assert create_reward(selected(name)).score([SAMPLE]) == [RewardResult(value=4.0)]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("plain", "plain function. Cure: decorate it with `@reward`"),
        ("Unfinished", "abstract class. Cure: implement score"),
        ("SAMPLE", "an object of type Sample; it must be a subclass of mmrl_core.Reward"),
        ("Prompt", "the class Prompt; it must be"),
        ("missing", "cannot import"),
    ],
)
def test_other_targets_are_plugin_errors(name: str, reason: str) -> None:
    with pytest.raises(PluginError, match="reward 'one' of dist 3") as caught:
        create_reward(selected(name))
    assert reason in str(caught.value)


def test_worker_environment_keeps_a_thread_count_that_is_set() -> None:
    given = {"RANK": "1", "ROLE_RANK": "2", "PATH": "/bin", "OMP_NUM_THREADS": "4", "RANKING": "kept"}
    assert worker_environment(given) == {"PATH": "/bin", "OMP_NUM_THREADS": "4", "RANKING": "kept"}


def test_statuses_in_words() -> None:
    assert describe_status(3 << 8) == "its worker exited with status 3"
    assert describe_status(64) == "its worker was killed by SIGRTMAX (Real-time signal 30)"
    assert describe_status(40).startswith("its worker was killed by signal 40 ")


def test_reward_modules_import_without_torch() -> None:
    modules = "checks creation executor frames function guard math options reasoning_gym_reward rule runners worker"
    script = (
        "import sys; sys.modules['torch'] = None\n"
        f"import importlib\nfor m in {modules.split()!r}: importlib.import_module('mmrl_core.rewards.' + m)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_option_models_import_without_checkers() -> None:
    script = (
        "import sys; sys.modules['torch'] = sys.modules['math_verify'] = sys.modules['sympy'] = None\n"
        "import mmrl_core.rewards.options"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
