"""From rewards to advantages, over the global table of a step's samples.

Every rank holds the same table, so every rank computes the same advantages without communicating. Statistics are
taken over *valid* samples only: a failed reward takes part in nothing and gets advantage 0.

Sources: GRPO, Shao et al., arXiv:2402.03300, section 4.1; Dr. GRPO, Liu et al., arXiv:2503.20783; RLOO,
Ahmadian et al., arXiv:2402.14740; dynamic sampling, Yu et al. (DAPO), arXiv:2503.14476, section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmrl_core.contracts import AdvantageEstimator
from mmrl_core.errors import RewardError
from mmrl_core.recipe import AdvantageSpec


@dataclass(frozen=True, kw_only=True)
class _Groups:
    """Statistics of the valid samples of each of P groups."""

    index: Tensor
    """[N] int64: which group each sample belongs to, 0 <= index < P."""
    ids: Tensor
    """[P] int64: the group ids, ascending."""
    count: Tensor
    """[P] float64: valid samples."""
    informative: Tensor
    """[P] bool: at least two valid samples whose rewards differ."""


def compute_advantages(rewards: Tensor, group_id: Tensor, valid: Tensor, spec: AdvantageSpec) -> Tensor:
    """One advantage per sample.

    With n the number of valid samples of the group, and `mean` and `std` (unbiased: n - 1) theirs:

    - `grpo`: (r - mean) / (std + eps)
    - `dr_grpo`: r - mean
    - `rloo`: r - (mean of the other n - 1) = n / (n - 1) * (r - mean)
    - `global_std`: (r - mean) / (std of all valid rewards of the table + eps)

    then clamped to [-clamp, clamp]. Invalid samples and groups with fewer than two valid samples get 0. A group of
    equal rewards gets exactly 0: it is recognised by comparing the rewards with each other, because their rounded mean
    may differ from them by an ulp, which a small `eps` would blow up to an advantage of order 1. For the same reason
    the table had better hold float64 when rewards are sums: 0.1 + 0.2 and 0.3 differ by 5e-17 there, by up to 6e-8 in
    float32.

    Args:
        rewards: [N] floating point; arbitrary, NaN included, where not `valid`.
        group_id: [N] int64; the rows of a group need not be adjacent here.
        valid: [N] bool.
        spec: the recipe's `algorithm.advantage`.

    Returns:
        [N] float32, computed in float64.
    """
    return _clamped(_unclamped(rewards, group_id, valid, spec), spec)


def combined_advantages(
    rewards: Tensor, weights: Sequence[float], group_id: Tensor, valid: Tensor, spec: AdvantageSpec
) -> Tensor:
    """Of several rewards, the weighted sum of each one's own advantage; then the clamp.

    With A_k the estimator's advantage of reward k by itself, unclamped: sum over k of weights[k] * A_k. With `grpo`
    and `global_std` each reward thus counts by its weight, whatever its scale and spread. A reward that is equal
    throughout a group adds exactly 0 there.

    Args:
        rewards: [N, K], one column a reward; otherwise as for `compute_advantages`.
        weights: K numbers; a reward of weight 0 takes no part.
        group_id, valid, spec: as for `compute_advantages`.

    Returns:
        [N] float32, computed in float64.
    """
    assert rewards.shape == (len(group_id), len(weights)), (rewards.shape, len(group_id), len(weights))
    total = torch.zeros(len(group_id), dtype=torch.float64, device=rewards.device)
    for column, weight in zip(rewards.unbind(1), weights, strict=True):
        if weight != 0.0:
            total = total + weight * _unclamped(column, group_id, valid, spec)
    return _clamped(total, spec)


def estimated_advantages(
    estimator: AdvantageEstimator,
    rewards: Tensor,
    weights: Sequence[float],
    group_id: Tensor,
    lengths: Tensor,
    spec: AdvantageSpec,
) -> Tensor:
    """A plugin's advantages: of each of K rewards by itself, weighted and summed; then the clamp.

    Args:
        rewards: [N, K] float64, none failed; weights: K numbers; a reward of weight 0 takes no part.
        group_id, lengths: [N] int64, as the estimator takes them.

    Returns:
        [N] float32.

    Raises:
        RewardError: the estimator returned another shape, or a number that is not finite.
    """
    total = torch.zeros(len(group_id), dtype=torch.float64)
    for column, weight in zip(rewards.unbind(1), weights, strict=True):
        if weight == 0.0:
            continue
        found = estimator.advantages(column, group_id, lengths)
        if found.shape != total.shape or not bool(torch.isfinite(found).all()):
            raise RewardError(
                f"{type(estimator).__name__}: advantages of {len(total)} samples must be that many finite numbers; got "
                f"shape {tuple(found.shape)}, {int((~torch.isfinite(found)).sum())} of them not finite"
            )
        total = total + weight * found.to(torch.float64)
    return _clamped(total, spec)


def _unclamped(rewards: Tensor, group_id: Tensor, valid: Tensor, spec: AdvantageSpec) -> Tensor:
    """[N] float64."""
    values, groups = _prepare(rewards, group_id, valid)
    mean = _sum_by_group(values, groups) / groups.count.clamp(min=1)
    centred = torch.where(valid, values - mean[groups.index], 0.0)
    count = groups.count[groups.index]
    if spec.name == "grpo":
        variance = _sum_by_group(centred.square(), groups) / (groups.count - 1).clamp(min=1)
        advantages = _divide(centred, variance.sqrt()[groups.index] + spec.eps)
    elif spec.name == "global_std":
        advantages = _divide(centred, _standard_deviation(values, valid) + spec.eps)
    elif spec.name == "rloo":
        advantages = centred * count / (count - 1).clamp(min=1)
    else:
        assert spec.name == "dr_grpo", spec.name
        advantages = centred
    return torch.where(valid & groups.informative[groups.index], advantages, 0.0)


def _clamped(advantages: Tensor, spec: AdvantageSpec) -> Tensor:
    """[N] float32."""
    if spec.clamp is not None:
        advantages = advantages.clamp(-spec.clamp, spec.clamp)
    return advantages.to(torch.float32)


def informative_groups(rewards: Tensor, group_id: Tensor, valid: Tensor) -> set[int]:
    """The ids of groups that teach something: at least two valid samples whose rewards differ (DAPO).

    Shapes as for `compute_advantages`. The other groups have advantage 0 for every sample, whatever the estimator.
    """
    _, groups = _prepare(rewards, group_id, valid)
    return set(groups.ids[groups.informative].tolist())


def shuffle_within_groups(rewards: Tensor, group_id: Tensor, valid: Tensor, seed: int) -> Tensor:
    """The rewards, permuted at random among the valid samples of each group: a control experiment.

    Group statistics stay what they were while rewards say nothing about samples any more, so that whatever still
    "improves" was not learnt from them. Invalid samples keep their entry. Deterministic in `seed`, which must differ
    from step to step; the same on every rank.

    Args:
        rewards: [N], or [N, K]: then the K rewards of a sample stay together.
        group_id, valid: as for `compute_advantages`.
        seed: seeds a generator of its own; global random state is untouched.

    Returns:
        The shape and dtype of `rewards`.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = rewards.clone()
    for group in torch.unique(group_id).tolist():
        rows = torch.nonzero((group_id == group) & valid).flatten()
        order = torch.randperm(len(rows), generator=generator).to(rows.device)
        shuffled[rows] = rewards[rows[order]]
    return shuffled


def _prepare(rewards: Tensor, group_id: Tensor, valid: Tensor) -> tuple[Tensor, _Groups]:
    """Rewards in float64 with 0 where invalid, and the statistics of their groups."""
    assert rewards.shape == group_id.shape == valid.shape, (rewards.shape, group_id.shape, valid.shape)
    assert rewards.ndim == 1, rewards.shape
    assert valid.dtype == torch.bool, valid.dtype
    values = torch.where(valid, rewards.to(torch.float64), 0.0)
    assert bool(torch.isfinite(values).all()), "a reward that is not finite must have been marked as failed"
    ids, index = torch.unique(group_id, return_inverse=True)
    count = torch.zeros(len(ids), dtype=torch.float64, device=values.device)
    count.index_add_(0, index, valid.to(torch.float64))
    highest = torch.full_like(count, -torch.inf).scatter_reduce_(
        0, index, torch.where(valid, values, -torch.inf), "amax", include_self=True
    )
    lowest = torch.full_like(count, torch.inf).scatter_reduce_(
        0, index, torch.where(valid, values, torch.inf), "amin", include_self=True
    )
    return values, _Groups(index=index, ids=ids, count=count, informative=(count >= 2) & (highest > lowest))


def _sum_by_group(values: Tensor, groups: _Groups) -> Tensor:
    """[N] -> [P]."""
    return torch.zeros_like(groups.count).index_add_(0, groups.index, values)


def _standard_deviation(values: Tensor, valid: Tensor) -> Tensor:
    """Unbiased, of the valid entries; 0 when there are fewer than two."""
    count = valid.sum()
    mean = values.sum() / count.clamp(min=1)
    squares = torch.where(valid, values - mean, 0.0).square().sum()
    return (squares / (count - 1).clamp(min=1)).sqrt()


def _divide(values: Tensor, scale: Tensor) -> Tensor:
    """values / scale, and 0 where scale is 0 (eps 0, and rewards that differ by less than their squares can tell)."""
    return torch.where(scale > 0, values / torch.where(scale > 0, scale, 1.0), 0.0)
