"""Backend checks: optimizer steps, the non-finite guard, the frozen reference, adapters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mmrl_core.contracts import Minibatch, Record
from mmrl_core.errors import BackendError
from mmrl_core.testing.backend_stage import BackendStage, Bench
from mmrl_core.testing.texts import CheckLoss, collected, relative_difference, unequal

UPDATE_KEYS = {"grad_norm", "actor/lr", "actor/skipped_updates", "check/log_prob", "check/largest_ratio"}
"""What `update` returns with the loss of the checks."""


def poisoned(minibatch: Minibatch) -> Minibatch:
    """The same with one advantage that is not a number."""
    advantages = minibatch.advantages.clone()
    advantages[0] = torch.nan
    return replace(minibatch, advantages=advantages)


def record_difference(left: Record, right: Record) -> float:
    """Largest difference between two references' log-probs."""
    assert sorted(left) == sorted(right)
    pairs = [(a, b) for name in left for a, b in zip(left[name], right[name], strict=True)]
    return max(float((a - b).abs().max()) for a, b in pairs)


def masked(log_probs: Tensor, minibatch: Minibatch) -> Tensor:
    """[actions]: the log-probs that count."""
    return log_probs[minibatch.rollouts.mask]


class UpdateChecks(BackendStage):
    """See BackendConformance."""

    def test_update_returns_metrics_and_changes_weights(self, bench: Bench) -> None:
        """The step's metrics come from here; `grad_norm` is the L2 norm before clipping, sums are over all actions."""
        backend, _ = bench.fresh()
        before = collected(backend.export_weights())
        gradients = collected(backend.gradients(bench.minibatch, CheckLoss()))
        metrics = backend.update(bench.minibatch, CheckLoss())
        assert metrics.keys() >= UPDATE_KEYS, f"missing: {sorted(UPDATE_KEYS - metrics.keys())}"
        assert all(type(value) is float for value in metrics.values()), "metrics are Python floats"
        norm = sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert metrics["check/log_prob"] == pytest.approx(
            float(masked(bench.expected.log_probs, bench.minibatch).mean()), rel=1e-4
        )
        assert bench.minibatch.old_log_probs is not None
        ratios = (bench.expected.log_probs - bench.minibatch.old_log_probs).exp()
        assert metrics["check/largest_ratio"] == pytest.approx(float(masked(ratios, bench.minibatch).max()), rel=1e-3)
        assert metrics["actor/skipped_updates"] == 0.0
        still = [n for n, t in collected(backend.export_weights()).items() if torch.equal(t, before[n])]
        assert not still, f"an update left these weights as they were: {still[:5]}"

    def test_updates_follow_the_gradient(self, bench: Bench) -> None:
        """Steps go downhill: tokens with positive advantage become likelier."""
        backend, _ = bench.fresh(optimizer={"lr": 3e-3, "weight_decay": 0.0})
        minibatch = replace(bench.minibatch, advantages=torch.ones(len(bench.rollouts)), old_log_probs=None)
        before = masked(backend.replay(bench.rollouts).log_probs, minibatch).mean()
        for _ in range(5):
            backend.update(minibatch, CheckLoss(entropy_coefficient=0.0))
        after = masked(backend.replay(bench.rollouts).log_probs, minibatch).mean()
        assert after > before + 0.1, f"mean log-prob went from {before:.3f} to {after:.3f}"

    def test_first_step_is_adamw(self, bench: Bench) -> None:
        """The first AdamW step is w <- w - lr * (decay * w + g / (|g| + eps)), with g the clipped gradient, and without
        decay for biases and norms (Loshchilov and Hutter 2019, with bias correction at t = 1)."""
        backend, _ = bench.fresh()
        before = collected(backend.export_weights())
        gradients = collected(backend.gradients(bench.minibatch, CheckLoss()))
        norm = sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5
        spec = bench.recipe["optimizer"]
        scale = min(1.0, spec["clip_grad"] / (norm + 1e-6))
        expected = {}
        for name, weight in before.items():
            g = gradients[name] * scale
            decay = spec["weight_decay"] if weight.ndim > 1 else 0.0
            expected[name] = -spec["lr"] * (decay * weight + g / (g.abs() + spec["eps"]))
        backend.update(bench.minibatch, CheckLoss())
        change = {name: tensor - before[name] for name, tensor in collected(backend.export_weights()).items()}
        difference = relative_difference(change, expected)
        assert difference <= 1e-3, f"the step differs from AdamW's by {difference:.2e} (relative L2)"

    def test_learning_rate_follows_the_schedule(self, bench: Bench) -> None:
        """Linear warm-up over `warmup_updates`, then the schedule over the run's updates."""
        backend, _ = bench.fresh(optimizer={"lr": 1e-3, "warmup_updates": 3, "schedule": "linear"})
        rates = [backend.update(bench.minibatch, CheckLoss())["actor/lr"] for _ in range(5)]
        assert rates[:3] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3])
        assert rates[4] < rates[3] <= 1e-3, "a linear schedule falls after warm-up"
        assert rates[4] == pytest.approx(1e-3 * (1 - 1 / 97), rel=2e-2)

    def test_non_finite_update_is_skipped(self, bench: Bench) -> None:
        """A NaN must not reach the weights: the step is skipped, counted, weights stay bit for bit, and the next good
        update is as if it had never been."""
        backend, _ = bench.fresh()
        before = collected(backend.export_weights())
        metrics = backend.update(poisoned(bench.minibatch), CheckLoss())
        assert metrics["actor/skipped_updates"] == 1.0
        assert not unequal(collected(backend.export_weights()), before), "a skipped update changed weights"
        assert backend.update(bench.minibatch, CheckLoss())["actor/skipped_updates"] == 0.0
        undisturbed, _ = bench.fresh()
        undisturbed.update(bench.minibatch, CheckLoss())
        changed = unequal(collected(backend.export_weights()), collected(undisturbed.export_weights()))
        assert not changed, f"the skipped update left a trace in {changed[:3]}"

    def test_too_many_skips_stop_the_run(self, bench: Bench) -> None:
        """A run that only skips learns nothing: BackendError after `max_skipped_updates` in a row."""
        backend, _ = bench.fresh(optimizer={"max_skipped_updates": 2})
        bad = poisoned(bench.minibatch)
        backend.update(bad, CheckLoss())
        backend.update(bench.minibatch, CheckLoss())
        backend.update(bad, CheckLoss())
        with pytest.raises(BackendError):
            backend.update(bad, CheckLoss())

    def test_reference_stays_what_it_was(self, bench: Bench) -> None:
        """The KL term is measured against the model that training started from."""
        backend, _ = bench.fresh(reference=True)
        before = backend.reference(bench.rollouts)
        assert all(len(rows) == len(bench.rollouts) for rows in before.values()), "one tensor a row"
        if "log_probs" in before:
            for row, expected, mask in zip(
                before["log_probs"], bench.expected.log_probs, bench.rollouts.mask, strict=True
            ):
                assert (row[: len(mask)] - expected[: len(row)])[
                    mask[: len(row)]
                ].abs().max() <= self.log_prob_tolerance
        for _ in range(2):
            backend.update(bench.minibatch, CheckLoss())
        assert record_difference(backend.reference(bench.rollouts), before) == 0.0, "the reference moved"

    def test_offload_and_onload_change_nothing(self, bench: Bench) -> None:
        """The loop offloads around generation; training goes on bit for bit."""
        backend, _ = bench.fresh()
        undisturbed, _ = bench.fresh()
        for one in (backend, undisturbed):
            one.update(bench.minibatch, CheckLoss())
        backend.offload()
        backend.onload()
        for one in (backend, undisturbed):
            one.update(bench.minibatch, CheckLoss())
        assert not unequal(collected(backend.export_weights()), collected(undisturbed.export_weights()))

    def test_lora_trains_adapters_only(self, bench: Bench) -> None:
        """With `model.lora` gradients and updates are the adapters' alone, and the merged export shows them."""
        self._require_lora()
        backend, _ = bench.fresh(lora=True)
        merged = collected(backend.export_weights())
        adapters = collected(backend.export_weights("adapter"))
        assert adapters, "no adapter weights"
        names = set(collected(backend.gradients(bench.minibatch, CheckLoss())))
        assert names <= set(adapters), f"gradients of {sorted(names - set(adapters))[:3]}, which are no adapters"
        backend.update(bench.minibatch, CheckLoss())
        backend.update(bench.minibatch, CheckLoss())
        assert len(unequal(collected(backend.export_weights("adapter")), adapters)) == len(adapters)
        changed = unequal(collected(backend.export_weights()), merged)
        assert changed, "the merged export does not show the adapters"
        assert not any("embed" in name or "norm" in name for name in changed), changed

    def test_lora_reference_is_the_base_model(self, bench: Bench) -> None:
        """With adapters no second copy is held: the reference is the adapters switched off, and then on again."""
        self._require_lora()
        backend, _ = bench.fresh(lora=True, reference=True)
        before = backend.reference(bench.rollouts)
        start = backend.replay(bench.rollouts).log_probs
        assert (start - bench.expected.log_probs).abs().max() <= self.log_prob_tolerance, "fresh adapters add nothing"
        for _ in range(2):
            backend.update(bench.minibatch, CheckLoss())
        trained = backend.replay(bench.rollouts).log_probs
        assert (trained - start).abs().max() > 1e-3, "training adapters changed nothing"
        assert record_difference(backend.reference(bench.rollouts), before) <= self.log_prob_tolerance
        assert torch.equal(backend.replay(bench.rollouts).log_probs, trained), "the adapters were left switched off"

    def _require_lora(self) -> None:
        if not self.lora:
            pytest.skip("the class says that this backend trains no adapters")
