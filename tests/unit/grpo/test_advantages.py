"""Advantages against a transcription in plain Python, sample by sample."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrl_core.grpo.advantages import (
    combined_advantages,
    compute_advantages,
    informative_groups,
    shuffle_within_groups,
)
from mmrl_core.recipe import AdvantageSpec

NAMES = ["grpo", "dr_grpo", "rloo", "global_std"]


def transcription(rewards, group_id, valid, spec):
    everything = [r for r, v in zip(rewards, valid, strict=True) if v]
    answer = []
    for reward, group, ok in zip(rewards, group_id, valid, strict=True):
        peers = [r for r, g, v in zip(rewards, group_id, valid, strict=True) if g == group and v]
        if not ok or len(peers) < 2 or len(set(peers)) == 1:
            answer.append(0.0)
            continue
        if spec.name == "rloo":
            others = list(peers)
            others.remove(reward)
            value = reward - statistics.fmean(others)
        else:
            value = reward - statistics.fmean(peers)
        if spec.name == "grpo":
            value /= statistics.stdev(peers) + spec.eps
        if spec.name == "global_std":
            value /= statistics.stdev(everything) + spec.eps
        if spec.clamp is not None:
            value = max(-spec.clamp, min(spec.clamp, value))
        answer.append(value)
    return answer


def table(seed, *, groups=7, failures=0.25, levels=None):
    draw = random.Random(seed)
    rows = [(g, draw.choice(levels) if levels else draw.gauss(1.0, 2.0)) for g in range(groups) for _ in range(6)]
    draw.shuffle(rows)
    return [r for _, r in rows], [10 * g + 3 for g, _ in rows], [draw.random() >= failures for _ in rows]


def tensors(rewards, group_id, valid, dtype=torch.float64):
    return torch.tensor(rewards, dtype=dtype), torch.tensor(group_id), torch.tensor(valid)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("clamp", [None, 0.7])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("levels", [None, [0.0, 1.0]])
def test_advantages_equal_the_formulas(name, clamp, seed, levels):
    spec = AdvantageSpec(name=name, clamp=clamp, eps=1e-3)
    rewards, group_id, valid = table(seed, levels=levels)
    got = compute_advantages(*tensors(rewards, group_id, valid), spec)
    assert got.dtype == torch.float32
    torch.testing.assert_close(
        got.double(), torch.tensor(transcription(rewards, group_id, valid, spec)).double(), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(reward=st.floats(-1e6, 1e6, allow_subnormal=False), size=st.integers(2, 40))
@settings(max_examples=40, deadline=None)
def test_equal_rewards_give_exactly_zero(name, dtype, reward, size):
    # A second group that differs, so that global_std does not divide by eps alone.
    rewards = torch.tensor([reward] * size + [0.0, 1.0], dtype=dtype)
    group_id = torch.tensor([5] * size + [6, 6])
    got = compute_advantages(
        rewards, group_id, torch.ones(size + 2, dtype=torch.bool), AdvantageSpec(name=name, eps=0.0)
    )
    assert (got[:size] == 0).all()
    assert torch.isfinite(got).all()
    assert got[size] < 0 < got[size + 1]


def test_the_mean_of_equal_rewards_may_differ_from_them():
    # Why equality is not tested against the mean: in float64 three times 0.1 has another mean than 0.1.
    rewards = torch.full((3,), 0.1, dtype=torch.float64)
    assert rewards.sum() / 3 != rewards[0]
    got = compute_advantages(
        rewards, torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool), AdvantageSpec(eps=0.0)
    )
    assert got.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_invalid_samples_get_zero_and_change_nothing(name, garbage):
    spec = AdvantageSpec(name=name)
    rewards, group_id, valid = table(11)
    spoilt = [r if v else garbage for r, v in zip(rewards, valid, strict=True)]
    got = compute_advantages(*tensors(spoilt, group_id, valid), spec)
    kept = [i for i, v in enumerate(valid) if v]
    alone = compute_advantages(
        *tensors([rewards[i] for i in kept], [group_id[i] for i in kept], [True] * len(kept)), spec
    )
    assert torch.equal(got[kept], alone)
    assert (got[~torch.tensor(valid)] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_fewer_than_two_valid_samples_give_zero(name):
    rewards = torch.tensor([1.0, 5.0, 2.0, 3.0, 7.0])
    group_id = torch.tensor([0, 0, 1, 2, 2])
    valid = torch.tensor([True, False, True, False, False])
    spec = AdvantageSpec(name=name, eps=0.0)
    assert compute_advantages(rewards, group_id, valid, spec).tolist() == [0.0] * 5
    assert informative_groups(rewards, group_id, valid) == set()
    nothing = compute_advantages(rewards[:0], group_id[:0], valid[:0], spec)
    assert nothing.shape == (0,)


@pytest.mark.parametrize("name", NAMES)
def test_advantages_do_not_depend_on_the_order_of_the_table(name):
    rewards, group_id, valid = tensors(*table(3))
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(0))
    spec = AdvantageSpec(name=name)
    straight = compute_advantages(rewards, group_id, valid, spec)
    torch.testing.assert_close(
        compute_advantages(rewards[order], group_id[order], valid[order], spec), straight[order], rtol=1e-6, atol=1e-7
    )


def test_rloo_is_group_mean_scaled():
    rewards, group_id, _ = tensors(*table(4))
    valid = torch.ones(len(rewards), dtype=torch.bool)
    mean_only = compute_advantages(rewards, group_id, valid, AdvantageSpec(name="dr_grpo"))
    torch.testing.assert_close(
        compute_advantages(rewards, group_id, valid, AdvantageSpec(name="rloo")), mean_only * 6 / 5
    )


def test_informative_groups_are_those_whose_valid_rewards_differ():
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.0, 1.0, 1.0, 1.0, 0.0])
    group_id = torch.tensor([4, 4, 4, 9, 9, 2, 2, 2])
    valid = torch.tensor([True, True, True, True, True, True, True, False])
    assert informative_groups(rewards, group_id, valid) == {9}


def test_a_reward_that_is_not_finite_must_be_marked_invalid():
    with pytest.raises(AssertionError, match="failed"):
        compute_advantages(
            torch.tensor([1.0, math.nan]), torch.tensor([0, 0]), torch.tensor([True, True]), AdvantageSpec()
        )


def test_shuffling_permutes_valid_rewards_within_groups_only():
    rewards, group_id, valid = tensors(*table(5))
    state = torch.get_rng_state()
    shuffled = shuffle_within_groups(rewards, group_id, valid, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(shuffled, rewards)
    assert torch.equal(shuffled[~valid], rewards[~valid])
    for group in group_id.unique():
        rows = (group_id == group) & valid
        assert sorted(shuffled[rows].tolist()) == sorted(rewards[rows].tolist())
    assert torch.equal(shuffled, shuffle_within_groups(rewards, group_id, valid, seed=1))
    assert not torch.equal(shuffled, shuffle_within_groups(rewards, group_id, valid, seed=2))


def test_shuffling_reaches_every_permutation_about_equally():
    rewards = torch.tensor([0.0, 1.0, 2.0])
    group_id, valid = torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool)
    seen: dict[tuple[float, ...], int] = {}
    for seed in range(600):
        key = tuple(shuffle_within_groups(rewards, group_id, valid, seed).tolist())
        seen[key] = seen.get(key, 0) + 1
    assert len(seen) == 6
    assert min(seen.values()) > 60


# ------------------------------------------------------------------------------------------------ several rewards


def columns(seed, scales):
    tables = [table(seed + i, failures=0.0) for i in range(len(scales))]
    group_id = tables[0][1]
    rewards = [[scale * r for r in rewards] for (rewards, _, _), scale in zip(tables, scales, strict=True)]
    return rewards, group_id, [random.Random(seed).random() >= 0.2 for _ in group_id]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("clamp", [None, 0.7])
@pytest.mark.parametrize("seed", range(3))
def test_combined_advantages_are_the_weighted_sum_of_each_rewards_own(name, clamp, seed):
    weights = (1.0, -0.5, 0.0, 2.0)
    rewards, group_id, valid = columns(seed, (1.0, 1000.0, 1e9, 0.01))
    free, spec = AdvantageSpec(name=name, eps=1e-3), AdvantageSpec(name=name, eps=1e-3, clamp=clamp)
    each = [transcription(column, group_id, valid, free) for column in rewards]
    want = [sum(w * a for w, a in zip(weights, row, strict=True)) for row in zip(*each, strict=True)]
    if clamp is not None:
        want = [max(-clamp, min(clamp, a)) for a in want]
    got = combined_advantages(
        torch.tensor(rewards, dtype=torch.float64).T, weights, torch.tensor(group_id), torch.tensor(valid), spec
    )
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), torch.tensor(want, dtype=torch.float64), rtol=1e-6, atol=1e-7)


def test_a_reward_of_large_spread_does_not_drown_another():
    small, large = [0.0, 0.0, 1.0, 1.0], [300.0, -900.0, 800.0, -400.0]
    group_id, valid = torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.bool)
    both = torch.tensor([small, large], dtype=torch.float64).T
    alone = compute_advantages(both.sum(1), group_id, valid, AdvantageSpec())
    torch.testing.assert_close(
        alone, compute_advantages(both[:, 1], group_id, valid, AdvantageSpec()), atol=2e-3, rtol=0
    )
    together = combined_advantages(both, (1.0, 1.0), group_id, valid, AdvantageSpec())
    assert together[3] > together[1] + 1.5, "the small reward tells these two apart"


def test_a_combined_reward_that_is_equal_in_a_group_adds_exactly_nothing():
    group_id, valid = torch.tensor([0, 0, 0, 1, 1]), torch.ones(5, dtype=torch.bool)
    rewards = torch.tensor([[0.1, 1.0], [0.1, 2.0], [0.1, 4.0], [0.3, 5.0], [0.5, 5.0]], dtype=torch.float64)
    spec = AdvantageSpec(eps=0.0)
    got = combined_advantages(rewards, (1.0, 1.0), group_id, valid, spec)
    assert torch.equal(got[:3], compute_advantages(rewards[:, 1], group_id, valid, spec)[:3])
    assert torch.equal(got[3:], compute_advantages(rewards[:, 0], group_id, valid, spec)[3:])
    assert not combined_advantages(rewards, (0.0, 0.0), group_id, valid, spec).any()


def test_one_permutation_shuffles_all_rewards_of_a_group():
    first, group_id, valid = tensors(*table(5))
    both = torch.stack([first, 10 * first], dim=1)
    shuffled = shuffle_within_groups(both, group_id, valid, seed=1)
    assert torch.equal(shuffled[:, 0], shuffle_within_groups(first, group_id, valid, seed=1))
    assert torch.equal(shuffled[:, 1], 10 * shuffled[:, 0])
