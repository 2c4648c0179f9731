"""A plugin's advantage estimator and policy-gradient term in the loop's formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmrl_core.contracts import ActionStats, AdvantageEstimator, LossBatch, PolicyGradient
from mmrl_core.errors import RecipeError, RewardError
from mmrl_core.grpo.advantages import estimated_advantages
from mmrl_core.grpo.losses import build_loss
from mmrl_core.plugins import load_plugins, resolve
from mmrl_core.recipe import AdvantageSpec, AlgorithmSpec, KlSpec, LossSpec, load_recipe
from mmrl_core.testing.tiny import tiny_recipe, write_recipe_file


class PerAction(AdvantageEstimator):
    """reward / lengths, so that every argument is seen; a reward of -1 breaks it."""

    def advantages(self, rewards: Tensor, group_id: Tensor, lengths: Tensor) -> Tensor:
        found = rewards / lengths
        return torch.where(rewards == -1, torch.nan, found)


class Squares(PolicyGradient):
    """-A * logp^2 / 2: a term that no built-in has."""

    scope = "sequence"

    def term(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, weight: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = (weight * -advantages * log_probs.square() / 2).sum()
        return loss, {"actor/pg_clipfrac": torch.tensor(0.25)}


GROUPS, LENGTHS = torch.tensor([0, 0, 1, 1]), torch.tensor([1, 2, 4, 5])
REWARDS = torch.tensor([[1.0, 10.0], [2.0, 0.0], [3.0, 20.0], [5.0, 0.0]], dtype=torch.float64)


def test_rewards_are_weighed_after_the_estimator_and_then_clamped() -> None:
    spec = AdvantageSpec.model_validate({"plugin": "mine", "clamp": 3.0})
    found = estimated_advantages(PerAction(None, spec), REWARDS, [1.0, 0.5], GROUPS, LENGTHS, spec)
    expected = (REWARDS[:, 0] + 0.5 * REWARDS[:, 1]) / LENGTHS
    torch.testing.assert_close(found, expected.clamp(-3, 3).float())
    assert found.dtype == torch.float32


def test_a_reward_of_weight_zero_takes_no_part() -> None:
    spec = AdvantageSpec()
    broken = REWARDS.clone()
    broken[:, 1] = -1
    found = estimated_advantages(PerAction(None, spec), broken, [1.0, 0.0], GROUPS, LENGTHS, spec)
    torch.testing.assert_close(found, (REWARDS[:, 0] / LENGTHS).float())


def test_advantages_that_are_no_numbers_stop_the_run() -> None:
    spec, broken = AdvantageSpec(), REWARDS.clone()
    broken[2, 0] = -1
    with pytest.raises(RewardError, match=r"PerAction.*1 of them not finite"):
        estimated_advantages(PerAction(None, spec), broken, [1.0, 1.0], GROUPS, LENGTHS, spec)


def test_a_plugins_term_stands_where_the_built_in_one_does() -> None:
    """KL, entropy, the policy's own factor and the metrics are the core's; the weight includes every factor."""
    algorithm = AlgorithmSpec(
        steps=1,
        prompts_per_step=1,
        samples_per_prompt=2,
        loss=LossSpec.model_validate({"plugin": "squares", "entropy_coef": 0.1}),
        kl=KlSpec(coef=0.5, estimator="k1"),
    )
    mask = torch.tensor([[True, True, False], [True, True, True]])
    draw = torch.Generator().manual_seed(0)
    log_probs, entropy, reference, factor = (torch.randn(2, 3, generator=draw) for _ in range(4))
    log_probs[0, 2] = torch.nan  # outside the mask
    leaf = log_probs.clone().requires_grad_()
    weight = torch.where(mask, torch.rand(2, 3, generator=draw), 0.0)
    advantages = torch.tensor([0.7, -1.3])
    loss = build_loss(algorithm, Squares(None, algorithm.loss))
    assert loss.scope == "sequence"
    output = loss(
        ActionStats(log_probs=leaf, entropy=entropy, weight=factor),
        LossBatch(
            advantages=advantages,
            mask=mask,
            weight=weight,
            metric_weight=mask / 5,
            behaviour_log_probs=torch.zeros(2, 3),
            reference_log_probs=reference,
        ),
    )
    clean = torch.where(mask, log_probs, 0.0)
    pg = (weight * factor * -advantages[:, None] * clean.square() / 2).sum()
    kl = (weight * (clean - torch.where(mask, reference, 0.0))).sum()
    torch.testing.assert_close(output.loss, pg + 0.5 * kl - 0.1 * (weight * entropy).sum())
    assert float(output.sums["actor/pg_loss"]) == pytest.approx(float(pg), rel=1e-5)
    assert float(output.sums["actor/pg_clipfrac"]) == pytest.approx(0.25)
    (gradient,) = torch.autograd.grad(output.loss, leaf)
    expected = weight * (factor * -advantages[:, None] * clean + 0.5)
    torch.testing.assert_close(gradient, torch.where(mask, expected, 0.0))


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"advantage": {"plugin": "no-such-thing"}}, "no advantage estimator called 'no-such-thing'"),
        ({"loss": {"plugin": {"name": "no-such-thing", "tau": 1}}}, "no policy loss called 'no-such-thing'"),
    ],
)
def test_a_plugin_that_is_not_there_is_an_error_with_its_line(
    tmp_path: Path, section: dict[str, Any], said: str
) -> None:
    path = write_recipe_file(tmp_path / "recipe.yaml", tiny_recipe("model", tmp_path, algorithm=section))
    recipe, source = load_recipe(path)
    with pytest.raises(RecipeError, match=said) as caught:
        resolve(recipe, source, load_plugins())
    assert "recipe.yaml:" in str(caught.value)
