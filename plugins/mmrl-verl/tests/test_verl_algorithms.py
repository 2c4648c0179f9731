"""verl's estimators and losses in mmrl's loop: the conformance kit, and which of verl's are refused and why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pyarrow
import pyarrow.parquet
import pytest
import torch
from mmrl_verl.algorithm_options import VerlEstimatorOptions, VerlLossOptions
from mmrl_verl.estimators import VerlEstimator
from mmrl_verl.policy_losses import VerlPolicyGradient

from mmrl_core.cli import main as cli
from mmrl_core.errors import BackendError, RewardError
from mmrl_core.recipe import AdvantageSpec, LossSpec
from mmrl_core.testing.algorithm_parts import AdvantageEstimatorConformance, PolicyGradientConformance
from mmrl_core.testing.tiny import tiny_language_model

RECIPE = Path(__file__).parents[3] / "recipes" / "verl_gsm8k.yaml"


class TestPassK(AdvantageEstimatorConformance):
    component = "verl"
    options: ClassVar[Mapping[str, Any]] = {"estimator": "grpo_passk"}


class TestOptimalBaseline(AdvantageEstimatorConformance):
    component = "verl"
    options: ClassVar[Mapping[str, Any]] = {"estimator": "opo"}


class TestReinforcePlusPlus(AdvantageEstimatorConformance):
    component = "verl"
    options: ClassVar[Mapping[str, Any]] = {"estimator": "reinforce_plus_plus"}
    per_group = False


class TestGspo(PolicyGradientConformance):
    component = "verl"
    options: ClassVar[Mapping[str, Any]] = {"loss": "gspo"}


class TestCispo(PolicyGradientConformance):
    component = "verl"
    options: ClassVar[Mapping[str, Any]] = {"loss": "cispo"}


class TestSapo(PolicyGradientConformance):
    """It divides each row by its length whatever is asked for; the recipe's aggregation holds all the same."""

    component = "verl"
    options: ClassVar[Mapping[str, Any]] = {"loss": "sapo"}


class TestDro(PolicyGradientConformance):
    component = "verl"
    options: ClassVar[Mapping[str, Any]] = {"loss": "dro", "dro_beta": 0.2}


@pytest.mark.parametrize("name", ["vanilla", "dppo_tv", "dppo_kl", "gpg"])
def test_other_losses_are_sums_too(name: str) -> None:
    part = VerlPolicyGradient(VerlLossOptions(loss=name), LossSpec())
    batch = PolicyGradientConformance.batch()
    whole, _ = part.term(**batch)
    halves = [part.term(**{k: v[rows] for k, v in batch.items()})[0] for rows in (slice(0, 3), slice(3, 6))]
    torch.testing.assert_close(whole, halves[0] + halves[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("kl_cov", "depends on which rows"),
        ("clip_cov", "depends on which rows"),
        ("geo_mean", "depends on which rows"),
        ("dro", "needs dro_beta"),
        ("gspoo", "Did you mean 'gspo'"),
    ],
)
def test_losses_that_are_no_sums_are_refused(name: str, said: str) -> None:
    with pytest.raises(BackendError, match=said):
        VerlPolicyGradient(VerlLossOptions(loss=name), LossSpec())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gae", "gamma, lam, values"),
        ("remax", "reward_baselines"),
        ("optimal_token_baseline", "old_log_probs, sum_pi_squared"),
        ("gdpo", "combine: advantages"),
        ("grpo_pass", "Did you mean 'grpo_passk'"),
    ],
)
def test_estimators_that_need_more_are_refused(name: str, said: str) -> None:
    with pytest.raises(RewardError, match=said):
        VerlEstimator(VerlEstimatorOptions(estimator=name), AdvantageSpec())


def test_tokens_of_a_sample_with_different_advantages_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a module of somebody's that registers an estimator with verl."""
    (tmp_path / "registrar_for_the_test.py").write_text(
        "from verl.trainer.ppo.core_algos import register_adv_est\n"
        "@register_adv_est('by_token_for_the_test')\n"
        "def by_token(token_level_rewards, response_mask, **others):\n"
        "    found = token_level_rewards.cumsum(-1) * response_mask\n"
        "    return found, found\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    options = VerlEstimatorOptions(
        estimator="by_token_for_the_test", import_modules=["registrar_for_the_test"], normalize_by_std=False
    )
    estimator = VerlEstimator(options, AdvantageSpec())
    with pytest.raises(RewardError, match="different advantages"):
        estimator.advantages(*AdvantageEstimatorConformance.table())


def test_the_recipe_trains_at_a_small_size(tmp_path: Path) -> None:
    """Everything of verl's at once: engine, data layout, a reward in its form, an estimator, a loss."""
    rows = [
        {
            "data_source": "mine",
            "prompt": [{"role": "user", "content": f"{n} + {n} ="}],
            "reward_model": {"style": "rule", "ground_truth": str(2 * n)},
            "extra_info": {"index": n, "letter": "a"},
        }
        for n in range(4)
    ]
    for split in ("train", "test"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{split}.parquet")
    (tmp_path / "score.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None, scale=1.0):\n"
        "    assert data_source == 'mine' and ground_truth in '0246', (data_source, ground_truth)\n"
        "    share = sum(c < extra_info['letter'] for c in solution_str) / max(1, len(solution_str))\n"
        "    return {'score': scale * share, 'length': len(solution_str), 'text': solution_str}\n"
    )
    tiny_language_model(tmp_path / "model")
    overrides = {
        "device": "cpu",
        "run_dir": tmp_path / "run",
        "launcher.processes": 1,
        "model.path": tmp_path / "model",
        "model.dtype": "float32",
        "data.path": tmp_path / "train.parquet",
        "eval.data.path": tmp_path / "test.parquet",
        "eval.prompts": 2,
        "eval.every": 2,
        "sampling.max_new_tokens": 6,
        "rewards.0.compute_score": f"{tmp_path}/score.py:compute_score",
        "rewards.0.reward_kwargs": "{scale: 2.0}",
        "rewards.0.deadline_s": 300,
        "rewards.0.on_failure": "stop",
        "algorithm.steps": 2,
        "algorithm.prompts_per_step": 4,
        "algorithm.advantage.plugin": "{name: verl, estimator: opo}",
        "algorithm.loss.plugin": "{name: verl, loss: cispo}",
        "writers": "[jsonl]",
    }
    assert cli.main(["train", str(RECIPE), *(f"{field}={value}" for field, value in overrides.items())]) == 0
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert {"actor/pg_clipfrac", "actor/kl_loss", "reward/verl/length"} <= step.keys()
        assert "reward/verl/text" not in step
        assert step["actor/skipped_updates"] == 0.0
        assert abs(step["mismatch/log_prob_diff_max"]) < 1e-4
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()
