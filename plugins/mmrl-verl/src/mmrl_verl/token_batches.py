"""Rows of text in the form that verl's engines read, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmrl_core.contracts import Minibatch, Rollouts
from mmrl_core.rows import select_record, select_rows

Rows = Sequence[int]


def spread(count: int, micro_batches: int) -> list[int]:
    """Row numbers of `count` rows, filled up with -1 to a multiple of `micro_batches`, as few as possible.

    verl cuts a batch into equal micro-batches.
    """
    each = -(-count // micro_batches)
    return [*range(count), *[-1] * (each * micro_batches - count)]


def to_verl(rollouts: Rollouts, rows: Rows, **settings: Any) -> Any:
    """A TensorDict of these rows (-1 is a copy of the first): jagged `input_ids` and `position_ids` of prompt and
    response together, `row` [b] the row numbers, `loss_mask` [b] the numbers of actions, and verl's settings."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils

    real = [max(row, 0) for row in rows]
    prompts, responses = rollouts.payload["prompt_ids"], rollouts.payload["response_ids"]
    tokens = [torch.cat([prompts[row], responses[row]]) for row in real]
    data = TensorDict(
        {
            "input_ids": torch.nested.as_nested_tensor(tokens, layout=torch.jagged),
            "position_ids": torch.nested.as_nested_tensor([torch.arange(len(t)) for t in tokens], layout=torch.jagged),
            "row": torch.tensor(list(rows), dtype=torch.int64),
            "loss_mask": rollouts.mask.sum(-1)[real],
        },
        batch_size=[len(real)],
    )
    tensordict_utils.assign_non_tensor(data, use_dynamic_bsz=False, use_fused_kernels=False, **settings)
    return data


def actions(values: Any, rollouts: Rollouts, rows: Rows) -> Tensor:
    """[b, T] out of verl's jagged [b, tokens]: what stands where each response token is predicted; 0 where not mask."""
    device, width = values.device, rollouts.mask.shape[1]
    real = [max(row, 0) for row in rows]
    mask = rollouts.mask[real].to(device)
    prompts = torch.tensor([len(rollouts.payload["prompt_ids"][row]) for row in real], device=device)
    # the last token of the prompt predicts the first of the response
    position = values.offsets()[:-1, None] + prompts[:, None] - 1 + torch.arange(width, device=device)
    flat = values.values()
    chosen = flat[torch.where(mask, position, 0)]
    found: Tensor = torch.where(mask, chosen, 0.0).float()
    return found


def part(minibatch: Minibatch, rows: Rows) -> Minibatch:
    """These rows of a minibatch; row -1 is the first with weight 0."""
    real = [max(row, 0) for row in rows]
    factor = torch.tensor([float(row >= 0) for row in rows])
    return Minibatch(
        rollouts=select_rows(minibatch.rollouts, real),
        advantages=minibatch.advantages[real] * factor,
        weight=minibatch.weight[real] * factor[:, None],
        metric_weight=minibatch.metric_weight[real] * factor[:, None],
        old_log_probs=None if minibatch.old_log_probs is None else minibatch.old_log_probs[real],
        reference=None if minibatch.reference is None else select_record(minibatch.reference, real),
    )
