"""Backend checks: exporting, saving and loading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmrl_core.errors import BackendError
from mmrl_core.testing.backend_stage import TEMPERATURE, BackendStage, Bench
from mmrl_core.testing.texts import CheckLoss, collected, plain_model, plain_stats, stored_names, unequal

MERGED_TOLERANCE = 1e-4
"""Log-probs of merged adapters against adapters beside the weights: another order of rounding, fp32."""


class WeightChecks(BackendStage):
    """See BackendConformance."""

    def test_export_is_the_model_that_was_loaded(self, bench: Bench) -> None:
        """Rollout engines and exported folders get weights under the folder's own names, full, tied ones once."""
        backend, _ = bench.default()
        weights = collected(backend.export_weights())
        assert sorted(weights) == stored_names(bench.model)
        stored = bench.plain.state_dict()
        assert not unequal(weights, {name: stored[name] for name in weights})

    def test_exported_folder_loads_in_transformers(self, bench: Bench, tmp_path: Path) -> None:
        """The end of a run is an ordinary Hugging Face folder whose log-probs are those of the trained network."""
        backend, cast = bench.fresh()
        backend.update(bench.minibatch, CheckLoss())
        cast.policy.save_weights(tmp_path / "export", backend.export_weights())
        assert stored_names(tmp_path / "export") == stored_names(bench.model)
        with torch.no_grad():
            expected = plain_stats(plain_model(tmp_path / "export"), bench.rollouts, TEMPERATURE).log_probs
        log_probs = backend.replay(bench.rollouts).log_probs
        assert (log_probs - expected).abs().max() <= self.log_prob_tolerance
        assert (log_probs - bench.expected.log_probs).abs().max() > 1e-2, "the update changed nothing"

    def test_export_is_a_snapshot_of_each_bucket(self, bench: Bench) -> None:
        """A weight stream may be consumed slowly; exporting changes nothing."""
        backend, _ = bench.default()
        assert not unequal(collected(backend.export_weights()), collected(backend.export_weights()))

    def test_lora_merged_export_equals_adapters_on(self, bench: Bench, tmp_path: Path) -> None:
        """The merged folder needs no peft and computes what the trained network computes."""
        if not self.lora:
            pytest.skip("the class says that this backend trains no adapters")
        backend, cast = bench.fresh(lora=True)
        for _ in range(2):
            backend.update(bench.minibatch, CheckLoss())
        cast.policy.save_weights(tmp_path / "export", backend.export_weights())
        assert stored_names(tmp_path / "export") == stored_names(bench.model)
        with torch.no_grad():
            merged = plain_stats(plain_model(tmp_path / "export"), bench.rollouts, TEMPERATURE).log_probs
        log_probs = backend.replay(bench.rollouts).log_probs
        assert (log_probs - merged).abs().max() <= MERGED_TOLERANCE
        assert (log_probs - bench.expected.log_probs).abs().max() > 1e-3, "training adapters changed nothing"

    @pytest.mark.parametrize("lora", [False, True])
    def test_resumed_training_is_bit_equal(self, bench: Bench, tmp_path: Path, lora: bool) -> None:
        """save -> load into a fresh backend -> update: the same weights as without the interruption, schedule
        included."""
        if lora and not self.lora:
            pytest.skip("the class says that this backend trains no adapters")
        schedule = {"warmup_updates": 2, "schedule": "cosine"}
        backend, _ = bench.fresh(lora=lora, optimizer=schedule)
        for _ in range(2):
            backend.update(bench.minibatch, CheckLoss())
        backend.save(tmp_path / "saved", optimizer=True)
        saved = collected(backend.export_weights())
        resumed, _ = bench.fresh(lora=lora, optimizer=schedule)
        resumed.load(tmp_path / "saved", optimizer=True)
        assert not unequal(collected(resumed.export_weights()), saved), "loading gave other weights"
        for _ in range(2):
            undisturbed_metrics = backend.update(bench.minibatch, CheckLoss())
            resumed_metrics = resumed.update(bench.minibatch, CheckLoss())
            assert resumed_metrics == undisturbed_metrics
        changed = unequal(collected(resumed.export_weights()), collected(backend.export_weights()))
        assert not changed, f"the resumed run differs in {changed[:3]}"

    def test_weights_alone_can_be_saved_and_loaded(self, bench: Bench, tmp_path: Path) -> None:
        """`checkpoint.save_optimizer: false` saves weights only; asking them for an optimizer is an error that says so,
        and loading them starts a fresh optimizer."""
        backend, _ = bench.fresh()
        backend.update(bench.minibatch, CheckLoss())
        backend.save(tmp_path / "saved", optimizer=False)
        fresh, _ = bench.fresh()
        with pytest.raises(BackendError):
            fresh.load(tmp_path / "saved", optimizer=True)
        fresh.load(tmp_path / "saved", optimizer=False)
        assert not unequal(collected(fresh.export_weights()), collected(backend.export_weights()))
        assert fresh.update(bench.minibatch, CheckLoss())["actor/skipped_updates"] == 0.0

    def test_optimizer_in_the_checkpoint_can_be_left_there(self, bench: Bench, tmp_path: Path) -> None:
        """`checkpoint.load_optimizer: false`: weights of a full checkpoint, and a fresh optimizer."""
        backend, _ = bench.fresh()
        backend.update(bench.minibatch, CheckLoss())
        backend.save(tmp_path / "saved", optimizer=True)
        fresh, _ = bench.fresh()
        fresh.load(tmp_path / "saved", optimizer=False)
        assert not unequal(collected(fresh.export_weights()), collected(backend.export_weights()))
