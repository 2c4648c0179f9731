"""One replica's share of one optimizer step, with weights normalised over the global minibatch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmrl_core.contracts import Minibatch, Record, Rollouts
from mmrl_core.grpo.aggregation import action_weights
from mmrl_core.grpo.collect import SampleRow
from mmrl_core.recipe import AlgorithmSpec
from mmrl_core.rows import select_record, select_rows


def build_minibatch(
    rollouts: Rollouts,
    groups: Sequence[int],
    kept: Sequence[SampleRow],
    advantages: Mapping[int, float],
    algorithm: AlgorithmSpec,
    *,
    max_actions: int,
    old_log_probs: Tensor | None,
    reference: Record | None,
) -> Minibatch:
    """This replica's rows of `groups`. A replica without any gets one of its rows with weight 0.

    Normalisers are counted over all `kept` samples of these groups, wherever they are, so the sum of all replicas'
    losses does not depend on how the rows are spread.
    """
    chosen = set(groups)
    everyone = [row for row in kept if row.group_id in chosen]
    actions = sum(row.actions for row in everyone)
    rows = [i for i, group in enumerate(rollouts.group_id.tolist()) if group in chosen]
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
