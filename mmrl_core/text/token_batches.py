"""Batches of token rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmrl_core.contracts import Rollouts


def left_pad(rows: Sequence[Tensor], pad_id: int) -> tuple[Tensor, Tensor]:
    """(ids, attention mask), both [rows, longest] int64, padded on the left."""
    ids = pad_sequence([r.flip(0) for r in rows], batch_first=True, padding_value=pad_id).flip(1)
    mask = pad_sequence([torch.ones_like(r) for r in rows], batch_first=True).flip(1)
    return ids, mask


def unique_prompts(batch: Rollouts) -> tuple[list[Tensor], Tensor]:
    """The prompts of adjacent rows of one group, once each, and [b] which of them each row has."""
    prompts: list[Tensor] = []
    index: list[int] = []
    previous: int | None = None
    for group, ids in zip(batch.group_id.tolist(), batch.payload["prompt_ids"], strict=True):
        if group != previous:
            prompts.append(ids)
            previous = group
        index.append(len(prompts) - 1)
    return prompts, torch.tensor(index, dtype=torch.int64)
