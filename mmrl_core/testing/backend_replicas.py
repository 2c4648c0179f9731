"""Backend checks across ranks: the split over replicas changes nothing, and ranks agree before they act."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmrl_core.testing.backend_stage import BackendStage, Bench
from mmrl_core.testing.stage import run_ranks
from mmrl_core.testing.texts import CheckLoss, Weights, collected, relative_difference, unequal
from mmrl_core.testing.tiny import write_recipe_file

CHANGE_TOLERANCE = 1e-3
"""Relative L2 distance of the change that a whole optimizer step makes: Adam divides rounding by small gradients."""

Seen = list[dict[str, Any]]
"""What each rank saw, by rank."""


class ReplicaChecks(BackendStage):
    """See BackendConformance. One start of the ranks serves all checks; each rank's answers are compared here."""

    @pytest.fixture(scope="class")
    @classmethod
    def seen(cls, bench: Bench) -> Seen:
        """Start the ranks once."""
        if not cls.ranks:
            pytest.skip("the class says ranks = 0")
        folder = bench.folder / "ranks"
        folder.mkdir()
        torch.save(bench.expected.log_probs, folder / "near.pt")
        recipe = write_recipe_file(folder / "recipe.yaml", bench.varied(options=cls.rank_options))
        adapters = bench.varied(options=cls.rank_options, lora=True)
        lora = write_recipe_file(folder / "lora.yaml", adapters) if cls.lora else "-"
        run_ranks("mmrl_core.testing.backend_ranks", [str(recipe), str(lora), str(folder)], cls.ranks, folder)
        return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(cls.ranks)]

    def test_ranks_know_their_replica(self, seen: Seen) -> None:
        """Data is partitioned over replicas: indices 0..count-1, one root each, the same count everywhere."""
        counts = {count for _, count, _ in (one["replica"] for one in seen)}
        assert len(counts) == 1
        (count,) = counts
        assert {index for index, _, _ in (one["replica"] for one in seen)} == set(range(count))
        for replica in range(count):
            roots = [root for index, _, root in (one["replica"] for one in seen) if index == replica]
            assert sum(roots) == 1, f"replica {replica} has {sum(roots)} roots"

    def test_ranks_replay_their_own_rows(self, bench: Bench, seen: Seen) -> None:
        """Replicas hold different numbers of groups, or a spare row only; each gets the log-probs of its rows."""
        for one in seen:
            for rows, replay in (("rows", "replay"), ("lopsided_rows", "lopsided_replay"), ("rows", "live")):
                if replay not in one:
                    continue  # no live module on offer
                expected = bench.expected.log_probs[one[rows]]
                difference = (one[replay] - expected).abs().max().item()
                assert difference <= self.log_prob_tolerance, f"{replay} is off by {difference:.2e}"
            for row, frozen in zip(one["rows"].tolist(), one["reference"], strict=bool(one["reference"])):
                assert (frozen - bench.expected.log_probs[row][: len(frozen)]).abs().max() <= self.log_prob_tolerance

    def test_ranks_export_whole_weights(self, bench: Bench, seen: Seen) -> None:
        """Every rank that exhausts the stream has every full weight."""
        stored = bench.plain.state_dict()
        for one in seen:
            assert not unequal(one["loaded"], {name: stored[name] for name in one["loaded"]})

    @pytest.mark.parametrize("kind", ["gradients", "lopsided_gradients"])
    def test_gradients_are_the_sum_over_replicas(self, bench: Bench, seen: Seen, kind: str) -> None:
        """N replicas x m groups is 1 x N*m, with uneven counts, and with an empty replica whose spare row has weight
        0: a sum, never an average."""
        expected = collected(bench.default()[0].gradients(bench.minibatch, CheckLoss()))
        for one in seen:
            difference = relative_difference(one[kind], expected)
            assert difference <= self.gradient_tolerance, f"off by {difference:.2e} (relative L2)"

    def test_metrics_are_the_same_on_every_rank(self, bench: Bench, seen: Seen) -> None:
        """Ranks take decisions from these numbers; they are those of one rank with all the rows."""
        for metrics in ("metrics", "next_metrics", "poisoned_metrics"):
            for one in seen[1:]:
                assert {k: str(v) for k, v in one[metrics].items()} == {
                    k: str(v) for k, v in seen[0][metrics].items()
                }, metrics
        backend, _ = bench.fresh()
        assert seen[0]["metrics"] == pytest.approx(backend.update(bench.minibatch, CheckLoss()), rel=1e-4, abs=1e-6)

    def test_updates_are_the_same_as_on_one_rank(self, bench: Bench, seen: Seen) -> None:
        """Two updates, the first with uneven shares, the second with an empty replica."""
        backend, _ = bench.fresh()
        start = collected(backend.export_weights())
        for weights in ("updated", "next"):
            backend.update(bench.minibatch, CheckLoss())
            expected = _change(collected(backend.export_weights()), start)
            for one in seen:
                assert not unequal(one[weights], seen[0][weights]), "ranks export different weights"
            difference = relative_difference(_change(seen[0][weights], start), expected)
            assert difference <= CHANGE_TOLERANCE, f"{weights}: the step is off by {difference:.2e} (relative L2)"

    def test_ranks_skip_a_non_finite_update_together(self, seen: Seen) -> None:
        """The NaN is in one replica's rows only: all ranks skip, and stop together when it goes on."""
        for one in seen:
            assert one["poisoned_metrics"]["actor/skipped_updates"] == 1.0
            assert not unequal(one["poisoned"], one["loaded"]), "a skipped update changed weights"
        stopped = [one["stopped"] for one in seen]
        assert len(set(stopped)) == 1, f"ranks stopped after {stopped} skipped updates"
        assert stopped[0] == 5, f"max_skipped_updates is 5; stopped after {stopped[0]}"

    def test_ranks_resume_bit_equal(self, seen: Seen) -> None:
        """save -> load -> update on the same ranks is the undisturbed run."""
        for one in seen:
            changed = unequal(one["resumed"], one["next"])
            assert not changed, f"the resumed run differs in {changed[:3]}"

    def test_checkpoint_loads_on_another_number_of_ranks(self, bench: Bench, seen: Seen) -> None:
        """What several ranks saved one rank can continue: the same weights, bit for bit, and optimizer."""
        backend, _ = bench.fresh()
        start = collected(backend.export_weights())
        backend.load(bench.folder / "ranks" / "saved", optimizer=True)
        assert not unequal(collected(backend.export_weights()), seen[0]["updated"])
        backend.update(bench.minibatch, CheckLoss())
        change = _change(collected(backend.export_weights()), start)
        assert relative_difference(change, _change(seen[0]["next"], start)) <= CHANGE_TOLERANCE

    def test_adapters_are_the_same_as_on_one_rank(self, bench: Bench, seen: Seen) -> None:
        """With LoRA too: the same start, the same updates, the same merged weights, the base model as reference."""
        if not self.lora:
            pytest.skip("the class says that this backend trains no adapters")
        backend, _ = bench.fresh(lora=True)
        for _ in range(2):
            backend.update(bench.minibatch, CheckLoss())
        adapters, merged = collected(backend.export_weights("adapter")), collected(backend.export_weights())
        for one in seen:
            assert relative_difference(one["lora"]["adapters"], adapters) <= CHANGE_TOLERANCE
            assert relative_difference(one["lora"]["merged"], merged) <= CHANGE_TOLERANCE
            for row, frozen in zip(one["rows"].tolist(), one["lora"]["reference"], strict=False):
                assert (frozen - bench.expected.log_probs[row][: len(frozen)]).abs().max() <= self.log_prob_tolerance


def _change(after: Weights, before: Weights) -> Weights:
    return {name: tensor - before[name] for name, tensor in after.items()}
