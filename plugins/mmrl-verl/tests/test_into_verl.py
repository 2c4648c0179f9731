"""The other direction: mmrl's rewards as verl's, and a plain verl process that cannot load what mmrl offers."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import mmrl_verl.rewards as rewards
import pytest

from mmrl_core.errors import PluginError, RecipeError, RewardError
from mmrl_core.testing.rewards import RewardConformance

ARGUMENTS = {"data_source": "mine", "solution_str": "It is 72.", "ground_truth": "72", "extra_info": {"index": 1}}


class TestVerlReward(RewardConformance):
    """verl's reward functions as a reward of mmrl."""

    component = "verl"
    options = {"data_source": "openai/gsm8k"}  # noqa: RUF012


def test_a_reward_by_its_name() -> None:
    assert rewards.numeric(**ARGUMENTS)["score"] == 1.0
    assert getattr(rewards, "mmrl-core:numeric")(**{**ARGUMENTS, "ground_truth": "71"})["score"] == 0.0


def test_what_verl_passes_beside_the_settings_is_no_option() -> None:
    served = {"reward_router_address": "127.0.0.1:1", "reward_model_tokenizer": object()}
    assert rewards.numeric(**ARGUMENTS, **served, run="inline", weight=2.0)["score"] == 2.0


def test_a_reward_that_fails_stops_and_is_no_number() -> None:
    with pytest.raises(RewardError, match="cannot leave a sample out"):
        rewards.numeric(**{**ARGUMENTS, "ground_truth": None}, run="inline")


def test_what_verl_does_not_tell_is_not_made_up() -> None:
    with pytest.raises(RewardError, match="not its length"):
        rewards.length(**ARGUMENTS, run="inline", maximum=5)


def test_unknown_names_and_options_say_what_exists() -> None:
    with pytest.raises(PluginError, match="Did you mean 'numeric'"):
        _ = rewards.numerik
    with pytest.raises(RecipeError, match="tolerence"):
        rewards.numeric(**ARGUMENTS, tolerence=1.0)


def test_the_function_survives_pickling() -> None:
    """Ray sends reward functions to its workers."""
    again = pickle.loads(pickle.dumps(rewards.numeric))  # noqa: S301 - our own bytes
    assert again(**ARGUMENTS, run="inline")["score"] == 1.0


def test_a_failing_import_is_printed_and_logging_left_alone(tmp_path: Path) -> None:
    """verl alone would log the one at DEBUG, and print everybody's log messages on the terminal."""
    (tmp_path / "mmrl_core").mkdir()
    (tmp_path / "mmrl_core" / "__init__.py").write_text("raise ImportError('broken for the test')\n")
    program = (
        "import logging; from mmrl_verl.importing import import_verl; import_verl(); print('verl goes on'); "
        "logging.getLogger().setLevel('DEBUG'); logging.getLogger('mmrl').info('seen by nobody')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "verl goes on" in done.stdout
    assert "mmrl-verl: what mmrl offers to verl" in done.stderr
    assert "broken for the test" in done.stderr
    assert "seen by nobody" not in done.stderr
