"""`RolloutEngineConformance`: what the core relies on in a rollout engine for text, proved on a tiny language model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmrl_core.contracts import Rollouts
from mmrl_core.testing.components import ComponentConformance
from mmrl_core.testing.engine_sampling import SamplingChecks
from mmrl_core.testing.engine_stage import LONGEST, Studio
from mmrl_core.testing.texts import CheckLoss, check_minibatch, plain_stats


class RolloutEngineConformance(SamplingChecks, ComponentConformance):
    """Subclass it as `Test...`, name the `component`, and set the class attributes of `EngineStage` that differ."""

    kind = "rollout"

    def test_shapes_and_types(self, studio: Studio) -> None:
        """Everything downstream is indexed by these: [B] ids, [B, T] mask and log-probs, in host memory, rows in the
        order of requests and of sample ids, groups adjacent, rows of a group sharing one prompt tensor."""
        requests = studio.requests(3, 4, first=5)
        rollouts = studio.engine.generate(requests, studio.sampling())
        rows = sum(len(r.sample_ids) for r in requests)
        assert rollouts.group_id.tolist() == [r.group_id for r in requests for _ in r.sample_ids]
        assert rollouts.sample_id.tolist() == [i for r in requests for i in r.sample_ids]
        assert rollouts.group_id.dtype == rollouts.sample_id.dtype == torch.int64
        assert rollouts.mask.dtype == rollouts.truncated.dtype == torch.bool
        assert rollouts.behaviour_log_probs.dtype == torch.float32
        assert rollouts.mask.shape == rollouts.behaviour_log_probs.shape
        assert rollouts.mask.shape[0] == rows
        assert rollouts.truncated.shape == (rows,)
        tensors = (rollouts.mask, rollouts.behaviour_log_probs, *rollouts.payload["response_ids"])
        assert all(t.device.type == "cpu" for t in tensors), "rollouts live in host memory"
        assert all(ids.dtype == torch.int64 for ids in rollouts.payload["response_ids"])
        prompts = rollouts.payload["prompt_ids"]
        for row, request in enumerate(r for r in requests for _ in r.sample_ids):
            assert torch.equal(prompts[row], studio.cast.policy.encode(request.prompt)["prompt_ids"])
        assert prompts[0] is prompts[1], "rows of a group share one prompt tensor"

    def test_uneven_groups(self, studio: Studio) -> None:
        """Dynamic sampling and evaluation may ask for groups of different sizes."""
        small, large = studio.requests(1, 1)[0], studio.requests(1, 3, first=1)[0]
        rollouts = studio.engine.generate([small, large], studio.sampling())
        assert rollouts.group_id.tolist() == [0, 1, 1, 1]

    def test_mask_covers_the_response_and_its_end_token(self, studio: Studio) -> None:
        """Trained actions are the response up to and including the end token, which comes once and last; nothing is
        recorded outside. `truncated` says that the length limit stopped it."""
        rollouts = studio.engine.generate(studio.requests(4, 8), studio.sampling())
        ends = studio.cast.policy.eos_ids
        for row, ids in enumerate(rollouts.payload["response_ids"]):
            assert 1 <= len(ids) <= LONGEST, "max_new_tokens is the limit"
            assert rollouts.mask[row].tolist() == [t < len(ids) for t in range(rollouts.mask.shape[1])]
            assert not set(ids[:-1].tolist()) & ends, "tokens after an end token"
            ended = int(ids[-1]) in ends
            assert bool(rollouts.truncated[row]) == (not ended)
            assert ended or len(ids) == LONGEST, "a response that neither ended nor reached the limit"
        assert not rollouts.behaviour_log_probs[~rollouts.mask].any(), "log-probs outside the mask must be 0"
        assert 0 < int(rollouts.truncated.sum()) < len(rollouts), "the check wants both kinds of rows"

    def test_ignore_eos_always_runs_to_the_limit(self, studio: Studio) -> None:
        """Benchmarks compare equal work."""
        rollouts = studio.engine.generate(studio.requests(2, 4), studio.sampling(ignore_eos=True))
        assert {len(ids) for ids in rollouts.payload["response_ids"]} == {LONGEST}

    def test_samples_are_decoded(self, studio: Studio) -> None:
        """Rewards see one Sample a row, in order, with its prompt, text, length and the truncation flag."""
        requests = studio.requests(3, 2)
        rollouts = studio.engine.generate(requests, studio.sampling())
        assert [s.sample_id for s in rollouts.samples] == rollouts.sample_id.tolist()
        assert [s.group_id for s in rollouts.samples] == rollouts.group_id.tolist()
        assert [s.prompt for s in rollouts.samples] == [r.prompt for r in requests for _ in r.sample_ids]
        assert [s.length for s in rollouts.samples] == rollouts.mask.sum(-1).tolist()
        assert [s.truncated for s in rollouts.samples] == rollouts.truncated.tolist()
        assert all(isinstance(s.text, str) for s in rollouts.samples)

    def test_log_probs_equal_replay(self, studio: Studio) -> None:
        """Behaviour log-probs mean what `semantics` declares; with one update per rollout nothing else is computed."""
        semantics = studio.engine.semantics
        rollouts = studio.engine.generate(studio.requests(4, 4), studio.sampling())
        replayed = studio.backend.replay(rollouts).log_probs
        difference = (rollouts.behaviour_log_probs - replayed)[rollouts.mask].abs().max().item()
        assert difference <= semantics.tolerance, f"off by {difference:.2e}; it declares {semantics.tolerance:.0e}"

    def test_log_probs_follow_the_declared_semantics(self, studio: Studio) -> None:
        """Under temperature and top-k too, the log-probs are those of the distribution that `semantics` names."""
        semantics = studio.engine.semantics
        rollouts = studio.engine.generate(studio.requests(3, 4), studio.sampling(temperature=0.6, top_k=5))
        with torch.no_grad():
            expected = plain_stats(studio.plain, rollouts, 0.6 if semantics.temperature_applied else 1.0).log_probs
        if semantics.truncation_renormalised:
            assert (rollouts.behaviour_log_probs >= expected - semantics.tolerance)[rollouts.mask].all()
            pytest.skip("renormalised log-probs are only bounded here: the cut depends on the engine's rounding")
        difference = (rollouts.behaviour_log_probs - expected)[rollouts.mask].abs().max().item()
        assert difference <= semantics.tolerance, f"off by {difference:.2e}; it declares {semantics.tolerance:.0e}"

    def test_twice_the_same(self, studio: Studio) -> None:
        """`deterministic`: the same weights, requests and batching give bit-equal rollouts, so resuming is exact."""
        if not studio.engine.deterministic:
            pytest.skip("the engine does not declare itself deterministic")
        first = studio.engine.generate(studio.requests(4, 4), studio.sampling())
        second = studio.engine.generate(studio.requests(4, 4), studio.sampling())
        assert torch.equal(first.behaviour_log_probs, second.behaviour_log_probs)
        assert _tokens(first) == _tokens(second)

    def test_samples_do_not_depend_on_their_batch(self, studio: Studio) -> None:
        """Seeds come with each sample, so a rollout does not depend on the number of ranks or on the order."""
        if not self.batch_invariant:
            pytest.skip("the class says batch_invariant = False")
        requests, sampling = studio.requests(4, 4), studio.sampling()
        together = studio.engine.generate(requests, sampling)
        expected = dict(zip(together.sample_id.tolist(), _tokens(together), strict=True))
        alone = [studio.engine.generate([request], sampling) for request in requests]
        reverse = studio.engine.generate(requests[::-1], sampling)
        single = replace(requests[2], sample_ids=requests[2].sample_ids[1:2], seeds=requests[2].seeds[1:2])
        for rollouts in (*alone, reverse, studio.engine.generate([single], sampling)):
            for sample, tokens in zip(rollouts.sample_id.tolist(), _tokens(rollouts), strict=True):
                assert tokens == expected[sample], f"sample {sample} changed with its batch"

    def test_no_requests(self, studio: Studio) -> None:
        """An engine replica may have nothing to do in a round: no rows, and the same fields."""
        rollouts = studio.engine.generate([], studio.sampling())
        assert len(rollouts) == 0
        assert rollouts.mask.shape[0] == rollouts.behaviour_log_probs.shape[0] == 0
        assert set(rollouts.payload) >= {"prompt_ids", "response_ids"}
        assert rollouts.samples == []

    def test_sleep_and_wake_change_nothing(self, studio: Studio) -> None:
        """The loop puts the engine to sleep while it trains. (Without new weights in between, samples stay.)"""
        before = studio.engine.generate(studio.requests(2, 2), studio.sampling())
        studio.engine.sleep()
        studio.engine.wake()
        after = studio.engine.generate(studio.requests(2, 2), studio.sampling())
        assert not studio.engine.deterministic or _tokens(before) == _tokens(after)

    def test_replica_is_in_range(self, studio: Studio) -> None:
        """Requests are dealt out by replica; one rank of each is its root."""
        replica = studio.engine.replica
        assert 0 <= replica.index < replica.count
        assert replica.is_root, "alone in the world, this rank is the root"

    def test_new_weights_are_used(self, studio: Studio) -> None:
        """After `update_weights` samples and log-probs are those of the new weights, tied embeddings included, and
        carry the new version."""
        cast = studio.rank.cast(studio.recipe)
        backend = cast.backend()
        engine = cast.engine(backend)
        try:
            before = engine.generate(studio.requests(4, 4), studio.sampling())
            assert before.policy_version == 0
            for _ in range(3):
                backend.update(check_minibatch(before), CheckLoss())
            engine.sleep()
            engine.update_weights(None if engine.weights == "shared" else backend.export_weights(), 3)
            engine.wake()
            after = engine.generate(studio.requests(4, 4), studio.sampling())
            replayed = backend.replay(after).log_probs
        finally:
            engine.close()
        assert after.policy_version == 3
        difference = (after.behaviour_log_probs - replayed)[after.mask].abs().max().item()
        assert difference <= engine.semantics.tolerance, f"log-probs of other weights: off by {difference:.2e}"
        with torch.no_grad():
            old = plain_stats(studio.plain, after).log_probs
        moved = (replayed - old)[after.mask].abs().max().item()
        assert moved > 100 * engine.semantics.tolerance, "the updates changed too little for this check"

    def test_works_without_a_backend(self, studio: Studio) -> None:
        """Evaluating a model folder has no training network: own weights, whatever the options say."""
        engine = studio.rank.cast(studio.recipe).engine(None)
        try:
            rollouts = engine.generate(studio.requests(2, 2), studio.sampling())
        finally:
            engine.close()
        with torch.no_grad():
            expected = plain_stats(studio.plain, rollouts).log_probs
        assert (rollouts.behaviour_log_probs - expected)[rollouts.mask].abs().max() <= engine.semantics.tolerance


def _tokens(rollouts: Rollouts) -> list[list[int]]:
    return [ids.tolist() for ids in rollouts.payload["response_ids"]]
