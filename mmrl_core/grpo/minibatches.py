"""Which samples an optimizer step learns from, and one replica's share, weighted over the global minibatch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor

from mmrl_core.contracts import Minibatch, Record, Rollouts
from mmrl_core.grpo.aggregation import action_weights
from mmrl_core.grpo.collect import SampleRow
from mmrl_core.grpo.distribute import chunk
from mmrl_core.recipe import AlgorithmSpec
from mmrl_core.rows import select_record, select_rows


def split_samples(kept: Sequence[SampleRow], algorithm: AlgorithmSpec) -> list[frozenset[int]]:
    """The sample ids of each minibatch of one pass; minibatches in which nothing is trained on are left out.

    With `minibatch_split: groups`, whole groups in order, in shares that differ by one group at most. With `samples`,
    row k of a group's G kept rows goes to minibatch floor(k * minibatches / G). The same on every rank.

    Args:
        kept: the samples that are trained on, by sample id.
        algorithm: the recipe's section.
    """
    by_group: dict[int, list[int]] = {}
    for row in kept:
        by_group.setdefault(row.group_id, []).append(row.sample_id)
    parts: list[set[int]] = [set() for _ in range(algorithm.minibatches)]
    if algorithm.minibatch_split == "samples":
        for ids in by_group.values():
            for k, sample in enumerate(ids):
                parts[k * len(parts) // len(ids)].add(sample)
    else:
        for part, groups in zip(parts, chunk(sorted(by_group), len(parts)), strict=False):
            part.update(sample for group in groups for sample in by_group[group])
    learned = {row.sample_id for row in kept if row.actions}
    return [frozenset(part) for part in parts if part & learned]


def build_minibatch(
    rollouts: Rollouts,
    samples: AbstractSet[int],
    kept: Sequence[SampleRow],
    advantages: Mapping[int, float],
    algorithm: AlgorithmSpec,
    *,
    max_actions: int,
    old_log_probs: Tensor | None,
    reference: Record | None,
) -> Minibatch:
    """This replica's rows of `samples` (ids). A replica without any gets one of its rows with weight 0.

    Normalisers are counted over all `kept` samples of the minibatch, wherever they are, so the sum of all replicas'
    losses does not depend on how the rows are spread.
    """
    everyone = [row for row in kept if row.sample_id in samples]
    actions = sum(row.actions for row in everyone)
    rows = [i for i, sample in enumerate(rollouts.sample_id.tolist()) if sample in samples]
    idle = not rows
    rows = rows or [0]
    part = select_rows(rollouts, rows)
    counted = torch.zeros_like(part.mask) if idle else part.mask
    weight = action_weights(
        counted,
        algorithm.loss.aggregation,
        global_actions=max(1, actions),
        global_sequences=max(1, sum(row.actions > 0 for row in everyone)),
        max_actions=max_actions,
    )
    return Minibatch(
        rollouts=part,
        advantages=torch.tensor([advantages.get(int(s), 0.0) for s in part.sample_id], dtype=torch.float32),
        weight=weight,
        metric_weight=counted.float() / max(1, actions),
        old_log_probs=None if old_log_probs is None else old_log_probs[torch.tensor(rows)],
        reference=None if reference is None else select_record(reference, rows),
    )
