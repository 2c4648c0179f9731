"""Text rollouts as rows of tokens for a Megatron model: prompt and response, padded on the right."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmrl_core.contracts import Rollouts


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """Positions of every row begin at 0, so rotary angles and the causal order need neither ids nor a mask."""

    ids: Tensor
    """[b, s] int64: prompt and all of the response that is fed, padded."""
    taken: Tensor
    """[b, T] bool: the actions that count."""
    sources: Tensor
    """[n] int64: where in [s, b], flattened, the state is that predicts each action taken, row by row."""
    targets: Tensor
    """[n] int64: the actions taken."""


def token_rows(batch: Rollouts, pad_id: int, multiple: int, device: torch.device) -> TokenRows:
    """The rows of a micro-batch on `device`; `s` is a multiple of `multiple`.

    When no action counts, the first row's first one is taken all the same, so that the model is in the graph; its
    weight is 0.
    """
    prompts, responses = batch.payload["prompt_ids"], batch.payload["response_ids"]
    width = batch.mask.shape[1]
    taken = batch.mask
    if not bool(taken.any()):
        taken = torch.zeros_like(taken)
        taken[0, 0] = True
    ids = pad_sequence(
        [torch.cat([p, r[:-1]]) for p, r in zip(prompts, responses, strict=True)],
        batch_first=True,
        padding_value=pad_id,
    )
    ids = torch.nn.functional.pad(ids, (0, -ids.shape[1] % multiple), value=pad_id)
    targets = pad_sequence(list(responses), batch_first=True, padding_value=pad_id)[:, :width]
    targets = torch.nn.functional.pad(targets, (0, width - targets.shape[1]), value=pad_id)
    starts = torch.tensor([len(p) - 1 for p in prompts])
    rows = len(prompts)
    sources = (starts[:, None] + torch.arange(width)) * rows + torch.arange(rows)[:, None]
    return TokenRows(
        ids=ids.to(device),
        taken=taken.to(device),
        sources=sources[taken].to(device),
        targets=targets[taken].to(device),
    )
