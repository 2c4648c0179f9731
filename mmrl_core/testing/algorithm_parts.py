"""`AdvantageEstimatorConformance` and `PolicyGradientConformance`: what the core relies on in a plugin's parts of the
algorithm. Random numbers only, no model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from mmrl_core.contracts import AdvantageEstimator, PolicyGradient
from mmrl_core.recipe import AdvantageSpec, LossSpec
from mmrl_core.testing.components import ComponentConformance

FRACTIONS = {"actor/pg_clipfrac", "actor/pg_clipfrac_lower"}


class AdvantageEstimatorConformance(ComponentConformance):
    """Subclass it as `Test...` and name the `component`."""

    kind = "advantage estimator"
    spec: ClassVar[Mapping[str, Any]] = {}
    """Fields of `algorithm.advantage` beside `plugin`."""
    per_group: ClassVar[bool] = True
    """Whether a group's advantages depend on that group's rewards only."""

    @pytest.fixture(scope="class")
    @classmethod
    def estimator(cls) -> AdvantageEstimator:
        """The component, where it is available."""
        cls.require_available()
        made: AdvantageEstimator = cls.selected().create(AdvantageSpec.model_validate(dict(cls.spec)))
        return made

    @staticmethod
    def table() -> tuple[Tensor, Tensor, Tensor]:
        """(rewards, groups, lengths) of 9 samples in groups of 2, 3 and 4 with ids that are not 0, 1, 2."""
        draw = torch.Generator().manual_seed(0)
        groups = torch.tensor([7, 7, 2, 2, 2, 9, 9, 9, 9])
        return torch.rand(9, generator=draw, dtype=torch.float64), groups, torch.tensor([3, 1, 4, 2, 2, 5, 1, 3, 4])

    def test_one_finite_number_a_sample(self, estimator: AdvantageEstimator) -> None:
        """[N] floating point, and not the same for all: something is learned."""
        found = estimator.advantages(*self.table())
        assert found.shape == (9,)
        assert found.is_floating_point()
        assert bool(torch.isfinite(found).all())
        assert found.std() > 0

    def test_it_changes_nothing_that_it_is_given(self, estimator: AdvantageEstimator) -> None:
        """The table is used afterwards, and the same table gives the same answer on every rank."""
        table = self.table()
        first = estimator.advantages(*table)
        assert all(torch.equal(a, b) for a, b in zip(table, self.table(), strict=True))
        assert torch.equal(first, estimator.advantages(*table))

    def test_the_order_of_samples_does_not_matter(self, estimator: AdvantageEstimator) -> None:
        """Rows of a group need not be adjacent in the table."""
        rewards, groups, lengths = self.table()
        order = torch.tensor([5, 0, 8, 2, 6, 1, 4, 7, 3])
        found = estimator.advantages(rewards[order], groups[order], lengths[order])
        torch.testing.assert_close(found, estimator.advantages(rewards, groups, lengths)[order], rtol=1e-6, atol=1e-7)

    def test_equal_rewards_are_finite(self, estimator: AdvantageEstimator) -> None:
        """A group whose rewards are all equal is ordinary."""
        rewards, groups, lengths = self.table()
        rewards[:2] = 0.1 + 0.2
        assert bool(torch.isfinite(estimator.advantages(rewards, groups, lengths)).all())

    def test_samples_without_actions_are_finite(self, estimator: AdvantageEstimator) -> None:
        """`algorithm.truncated: mask` leaves samples in the group that take no action."""
        rewards, groups, lengths = self.table()
        lengths[3] = 0
        assert bool(torch.isfinite(estimator.advantages(rewards, groups, lengths)).all())

    def test_other_groups_do_not_matter(self, estimator: AdvantageEstimator) -> None:
        """As the class says with `per_group`."""
        if not self.per_group:
            pytest.skip("the class says that advantages depend on the whole table")
        rewards, groups, lengths = self.table()
        alone = estimator.advantages(rewards[2:5], groups[2:5], lengths[2:5])
        torch.testing.assert_close(alone, estimator.advantages(rewards, groups, lengths)[2:5], rtol=1e-6, atol=1e-7)


class PolicyGradientConformance(ComponentConformance):
    """Subclass it as `Test...` and name the `component`."""

    kind = "policy loss"
    spec: ClassVar[Mapping[str, Any]] = {"clip_low": 0.2, "clip_high": 0.3}
    """Fields of `algorithm.loss` beside `plugin`."""
    on_policy: ClassVar[bool] = True
    """Whether an action's gradient is -weight * advantage when current and old log-probs are equal."""

    @pytest.fixture(scope="class")
    @classmethod
    def part(cls) -> PolicyGradient:
        """The component, where it is available."""
        cls.require_available()
        made: PolicyGradient = cls.selected().create(LossSpec.model_validate(dict(cls.spec)))
        return made

    @staticmethod
    def batch(seed: int = 0) -> dict[str, Tensor]:
        """6 ragged rows of up to 5 actions, as `PolicyGradient.term` takes them."""
        draw = torch.Generator().manual_seed(seed)
        mask = torch.arange(5) < torch.tensor([5, 3, 1, 4, 2, 5])[:, None]
        old = -2.0 + 0.5 * torch.randn(6, 5, generator=draw)
        values = {
            "log_probs": old + 0.3 * torch.randn(6, 5, generator=draw),
            "old_log_probs": old,
            "advantages": torch.randn(6, 1, generator=draw).expand(6, 5),
            "weight": torch.rand(6, 5, generator=draw),
        }
        return {name: torch.where(mask, value, 0.0) for name, value in values.items()} | {"mask": mask}

    @staticmethod
    def gradient(part: PolicyGradient, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(loss, dL/dlogp [b, t])."""
        leaf = batch["log_probs"].clone().requires_grad_()
        loss, _ = part.term(**{**batch, "log_probs": leaf})
        (found,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), found

    def test_a_scalar_with_gradient_and_known_fractions(self, part: PolicyGradient) -> None:
        """The loss is a scalar; fractions are scalars between 0 and 1 under names that the metrics know."""
        batch = self.batch()
        loss, fractions = part.term(**{**batch, "log_probs": batch["log_probs"].clone().requires_grad_()})
        assert loss.ndim == 0
        assert loss.requires_grad
        assert fractions.keys() <= FRACTIONS
        assert all(not f.requires_grad and 0.0 <= float(f) <= 1.0 for f in fractions.values())

    def test_the_loss_is_a_sum_over_rows(self, part: PolicyGradient) -> None:
        """However micro-batches and replicas cut the rows, the losses and gradients add up to the same."""
        batch = self.batch()
        whole, gradient = self.gradient(part, batch)
        parts = [
            self.gradient(part, {name: value[rows] for name, value in batch.items()})
            for rows in (slice(0, 1), slice(1, 4), slice(4, 6))
        ]
        torch.testing.assert_close(sum(loss for loss, _ in parts), whole, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.cat([g for _, g in parts]), gradient, rtol=1e-5, atol=1e-6)

    def test_weights_weigh(self, part: PolicyGradient) -> None:
        """Twice the weight, twice the loss and gradient; weight 0 is an action that is not there."""
        batch = self.batch()
        loss, gradient = self.gradient(part, batch)
        twice, doubled = self.gradient(part, {**batch, "weight": 2 * batch["weight"]})
        torch.testing.assert_close(twice, 2 * loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(doubled, 2 * gradient, rtol=1e-5, atol=1e-6)
        weight = batch["weight"].clone()
        weight[1] = 0.0
        _, without = self.gradient(part, {**batch, "weight": weight})
        assert not without[1].any()

    def test_nothing_flows_outside_the_mask(self, part: PolicyGradient) -> None:
        """Padding has no gradient."""
        batch = self.batch()
        _, gradient = self.gradient(part, batch)
        assert not gradient[~batch["mask"]].any()
        assert bool(torch.isfinite(gradient).all())

    def test_the_first_update_is_the_policy_gradient(self, part: PolicyGradient) -> None:
        """With current equal to old log-probs, dL/dlogp is -weight * advantage."""
        if not self.on_policy:
            pytest.skip("the class says that it is not")
        batch = self.batch()
        _, gradient = self.gradient(part, {**batch, "log_probs": batch["old_log_probs"]})
        torch.testing.assert_close(gradient, -batch["weight"] * batch["advantages"], rtol=1e-5, atol=1e-6)
