"""Cutting work: chunks by groups or by samples, and losses over whole rows when actions are replayed in slices."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmrl_core.backends.micro_batches import accumulate, micro_batches, padded_chunks, row_chunks
from mmrl_core.contracts import ActionStats, Minibatch, Rollouts
from mmrl_core.grpo.losses import build_loss
from mmrl_core.recipe import AlgorithmSpec
from mmrl_core.world import World

CPU = torch.device("cpu")


def rollouts_of(sizes: Sequence[int], width: int = 4) -> Rollouts:
    groups = [g for g, size in enumerate(sizes) for _ in range(size)]
    draw = torch.Generator().manual_seed(0)
    mask = torch.rand(len(groups), width, generator=draw) < 0.8
    return Rollouts(
        group_id=torch.tensor(groups),
        sample_id=torch.arange(len(groups)),
        mask=mask,
        behaviour_log_probs=torch.where(mask, -torch.rand(mask.shape, generator=draw), 0.0),
        truncated=torch.zeros(len(groups), dtype=torch.bool),
        policy_version=0,
        payload={"features": list(torch.randn(len(groups), width, 3, generator=draw))},
    )


def minibatch_of(rollouts: Rollouts) -> Minibatch:
    draw = torch.Generator().manual_seed(1)
    weight = rollouts.mask.float() / rollouts.mask.sum()
    return Minibatch(
        rollouts=rollouts,
        advantages=torch.randn(len(rollouts), generator=draw),
        weight=weight,
        metric_weight=weight.clone(),
        old_log_probs=rollouts.behaviour_log_probs + 0.1 * torch.randn(rollouts.mask.shape, generator=draw),
    )


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6), at_once=st.integers(1, 7))
def test_chunks_hold_every_row_once_in_order(sizes: list[int], at_once: int) -> None:
    rollouts = rollouts_of(sizes)
    by_groups, by_samples = row_chunks(rollouts, at_once), row_chunks(rollouts, 1, samples_per_chunk=at_once)
    for chunks in (by_groups, by_samples):
        assert [row for chunk in chunks for row in chunk] == list(range(len(rollouts)))
    held = [set(rollouts.group_id[chunk].tolist()) for chunk in by_groups]
    assert sum(map(len, held)) == len(sizes), "groups stay whole"
    assert max(map(len, held)) <= at_once
    assert {len(chunk) for chunk in by_samples[:-1]} <= {at_once}
    assert 1 <= len(by_samples[-1]) <= at_once


def test_padding_has_no_weight() -> None:
    class Busier(World):
        """Another replica has five chunks."""

        def maximum(self, value: int) -> int:
            return max(value, 5)

    minibatch = minibatch_of(rollouts_of([2, 2]))
    assert padded_chunks(minibatch.rollouts, 9, Busier(), samples_per_chunk=3) == [
        ([0, 1, 2], True),
        ([3], True),
        *[([0], False)] * 3,
    ]
    parts = list(micro_batches(minibatch, 9, Busier(), samples_per_chunk=3))
    assert torch.equal(torch.cat([p.weight for p in parts[:2]]), minibatch.weight)
    for part in parts[2:]:
        assert not part.weight.any()
        assert not part.metric_weight.any()


# ------------------------------------------------------------------------------------------- the policy's own factor


@pytest.mark.parametrize("name", ["ppo_clip", "gspo"])
@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("samples", [None, 1, 3])
def test_slices_and_samples_give_the_gradient_of_the_whole(name: str, factors: bool, samples: int | None) -> None:
    """A policy that asks for a factor on each action gets the same gradient however the actions are cut."""
    rollouts = rollouts_of([3, 2])
    width = rollouts.mask.shape[1]
    minibatch = minibatch_of(rollouts)
    recipe = AlgorithmSpec(steps=1, prompts_per_step=2, samples_per_prompt=3, loss={"name": name}, kl={"coef": 0.1})
    loss = build_loss(recipe)

    def gradient(slices: Sequence[slice], at_once: int | None) -> tuple[torch.Tensor, float]:
        head = torch.tensor([0.3, -0.2, 0.1], requires_grad=True)
        value = 0.0
        for part in micro_batches(minibatch, 9, World(), samples_per_chunk=at_once):
            features = torch.stack(part.rollouts.payload["features"])

            def replay(
                actions: slice, gradient: bool, features: torch.Tensor = features, part: Minibatch = part
            ) -> ActionStats:
                inputs = features[:, actions]
                return ActionStats(
                    log_probs=torch.nn.functional.logsigmoid(inputs @ head),
                    kl=(inputs @ head).square(),
                    weight=inputs.square().sum(-1) if factors else None,
                )

            value += float(accumulate(replay, part, loss, slices, CPU).loss.detach())
        assert head.grad is not None
        return head.grad, value

    whole, value = gradient([slice(0, width)], None)
    cut, total = gradient([slice(t, t + 1) for t in range(width)], samples)
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-7)
    assert total == pytest.approx(value, rel=1e-5)
    assert whole.abs().max() > 1e-3
