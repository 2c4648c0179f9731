"""From one loss per action to one number: the weights that make every aggregation a plain sum.

The normaliser is counted over the *global* minibatch beforehand, so sums over micro-batches and replicas do not depend
on how the work was split.

Sources: token-mean, Yu et al. (DAPO), arXiv:2503.14476, section 3.3; seq-mean-token-mean, Shao et al. (GRPO),
arXiv:2402.03300; seq-mean-token-sum-norm, Liu et al. (Dr. GRPO), arXiv:2503.20783.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]


def action_weights(
    mask: Tensor, aggregation: Aggregation, *, global_actions: int, global_sequences: int, max_actions: int
) -> Tensor:
    """Weights such that summing weight * x over all micro-batches and replicas is the recipe's aggregation of x.

    - `token-mean`: mask / global_actions
    - `seq-mean-token-mean`: mask / (actions of the row * global_sequences)
    - `seq-mean-token-sum`: mask / global_sequences
    - `seq-mean-token-sum-norm`: mask / (global_sequences * max_actions)

    Rows without actions get 0. With nothing to count anywhere all weights are 0.

    Args:
        mask: [B, T] bool, this replica's share.
        aggregation: the recipe's `algorithm.loss.aggregation`.
        global_actions: actions in the whole minibatch, over all replicas.
        global_sequences: rows in the whole minibatch that have actions, over all replicas.
        max_actions: the limit on a row's actions, a constant of the run (Dr. GRPO): not the longest row at hand.

    Returns:
        [B, T] fp32.
    """
    assert mask.dtype == torch.bool, mask.dtype
    assert mask.ndim == 2, mask.shape
    rows = torch.ones(mask.shape[0], 1, dtype=torch.float64, device=mask.device)
    sequences = max(global_sequences, 1)
    if aggregation == "token-mean":
        normaliser = rows * max(global_actions, 1)
    elif aggregation == "seq-mean-token-mean":
        normaliser = mask.sum(dim=1, keepdim=True).clamp(min=1) * rows * sequences
    elif aggregation == "seq-mean-token-sum":
        normaliser = rows * sequences
    else:
        assert aggregation == "seq-mean-token-sum-norm", aggregation
        assert max_actions >= 1, max_actions
        normaliser = rows * sequences * max_actions
    return (mask / normaliser).to(torch.float32)
