"""Backend checks: log-probs and gradients are those of the model, however the work is cut."""

from __future__ import annotations

import pytest
import torch

from mmrl_core.contracts import Minibatch, TrainingBackend
from mmrl_core.errors import BackendError
from mmrl_core.testing.backend_stage import TEMPERATURE, BackendStage, Bench
from mmrl_core.testing.texts import (
    CheckLoss,
    Weights,
    check_minibatch,
    collected,
    plain_gradients,
    plain_model,
    relative_difference,
    text_rollouts,
    unequal,
)

REFERENCE_GRADIENT_TOLERANCE = 1e-4
"""Relative L2 distance from transformers' autograd: other kernels and another order of summation, fp32."""


def gradients(backend: TrainingBackend, minibatch: Minibatch, loss: CheckLoss | None = None) -> Weights:
    """`backend.gradients` as a dictionary."""
    return collected(backend.gradients(minibatch, loss or CheckLoss()))


class GradientChecks(BackendStage):
    """See BackendConformance."""

    def test_replay_equals_transformers(self, bench: Bench) -> None:
        """Ratios and the KL term are built from `replay`: [B, T] fp32 on the CPU, at the sampling temperature, dropout
        off, 0 where not mask, equal to transformers' own on ragged rows."""
        backend, _ = bench.default()
        stats = backend.replay(bench.rollouts)
        mask = bench.rollouts.mask
        assert stats.log_probs.shape == mask.shape
        assert stats.log_probs.dtype == torch.float32
        assert stats.log_probs.device.type == "cpu"
        assert not stats.log_probs.requires_grad
        assert not stats.log_probs[~mask].any(), "log-probs outside the mask must be 0"
        difference = (stats.log_probs - bench.expected.log_probs)[mask].abs().max().item()
        assert difference <= self.log_prob_tolerance, f"replay is off by {difference:.2e}"
        if stats.entropy is not None:
            assert bench.expected.entropy is not None
            entropy = (stats.entropy - bench.expected.entropy)[mask].abs().max().item()
            assert entropy <= 10 * self.log_prob_tolerance, f"entropy is off by {entropy:.2e}"

    def test_replay_twice_is_bit_equal(self, bench: Bench) -> None:
        """A first ratio of exactly 1 needs the same log-probs from the same weights and shapes."""
        backend, _ = bench.default()
        first, second = backend.replay(bench.rollouts), backend.replay(bench.rollouts)
        assert torch.equal(first.log_probs, second.log_probs)

    def test_rows_of_one_action_and_one_group(self, bench: Bench) -> None:
        """Filters may leave a single group, and a response may be one token."""
        backend, cast = bench.default()
        rollouts = text_rollouts(cast.policy, (2,), longest=1, seed=3)
        assert backend.replay(rollouts).log_probs.shape == (2, 1)
        assert gradients(backend, check_minibatch(rollouts))

    def test_gradients_equal_autograd(self, bench: Bench) -> None:
        """`gradients` (and so `update`) differentiates the *sum* of the loss: no division by micro-batches or ranks.
        Names are those of the model folder, tensors are full."""
        backend, _ = bench.default()
        loss = CheckLoss()
        expected = plain_gradients(bench.plain, bench.minibatch, loss, TEMPERATURE)
        difference = relative_difference(gradients(backend, bench.minibatch, loss), expected)
        assert difference <= REFERENCE_GRADIENT_TOLERANCE, f"gradients are off by {difference:.2e} (relative L2)"

    def test_gradients_without_old_log_probs(self, bench: Bench) -> None:
        """With one update per rollout the old log-probs are the current ones, detached: no extra pass."""
        backend, _cast = bench.default()
        minibatch = check_minibatch(bench.rollouts)
        expected = plain_gradients(bench.plain, minibatch, CheckLoss(), TEMPERATURE)
        assert relative_difference(gradients(backend, minibatch), expected) <= REFERENCE_GRADIENT_TOLERANCE

    def test_gradients_of_a_loss_over_whole_rows(self, bench: Bench) -> None:
        """A loss of scope `sequence` needs whole rows; a backend that slices along T feeds dL/dlogp back."""
        backend, _ = bench.default()
        loss = CheckLoss("sequence")
        expected = plain_gradients(bench.plain, bench.minibatch, loss, TEMPERATURE)
        assert relative_difference(gradients(backend, bench.minibatch, loss), expected) <= REFERENCE_GRADIENT_TOLERANCE

    def test_gradients_leave_everything_as_it_was(self, bench: Bench) -> None:
        """`gradients` is for proofs: weights stay, and nothing is left over for the next call."""
        backend, _ = bench.default()
        before = collected(backend.export_weights())
        first = gradients(backend, bench.minibatch)
        second = gradients(backend, bench.minibatch)
        assert not unequal(first, second), "the same call twice gave different gradients"
        assert not unequal(collected(backend.export_weights()), before)

    def test_gradients_do_not_depend_on_how_work_is_cut(self, bench: Bench) -> None:
        """Sizes of micro-batches, recomputation and the like change speed and memory only."""
        if not self.equivalent_options:
            pytest.skip("the class names no equivalent_options")
        expected = gradients(bench.default()[0], bench.minibatch)
        for options in self.equivalent_options:
            backend, _ = bench.fresh(options=options)
            difference = relative_difference(gradients(backend, bench.minibatch), expected)
            assert difference <= self.gradient_tolerance, f"{options}: off by {difference:.2e} (relative L2)"

    def test_gradients_do_not_depend_on_prefix_sharing(self, bench: Bench) -> None:
        """Computing a group's prompt once changes speed, and the result only within fp32 rounding."""
        expected = gradients(bench.default()[0], bench.minibatch)
        for options in self.equivalent_policy_options:
            backend, _ = bench.fresh(policy=options)
            difference = relative_difference(gradients(backend, bench.minibatch), expected)
            assert difference <= self.gradient_tolerance, f"{options}: off by {difference:.2e} (relative L2)"
            log_probs = backend.replay(bench.rollouts).log_probs
            assert (log_probs - bench.expected.log_probs).abs().max() <= self.log_prob_tolerance, options

    def test_inference_module_is_the_live_network(self, bench: Bench) -> None:
        """Rollout engines with shared weights generate with it; training goes on afterwards. A backend that offers
        none says so, and says it again when asked."""
        backend, cast = bench.default()
        if not backend.shares_module:
            with pytest.raises(BackendError), backend.inference_module():
                pass
            return
        before = gradients(backend, bench.minibatch)
        with torch.no_grad(), backend.inference_module() as module:
            log_probs = cast.policy.replay(module, bench.rollouts).log_probs.cpu()
        assert (log_probs - bench.expected.log_probs).abs().max() <= self.log_prob_tolerance
        assert not unequal(gradients(backend, bench.minibatch), before), "training changed after inference_module"

    def test_reference_model_was_not_touched_by_the_checks(self, bench: Bench) -> None:
        """The comparison above is with the model as it lies in its folder."""
        stored = plain_model(bench.model).state_dict()
        assert not unequal(dict(bench.plain.state_dict()), dict(stored))
