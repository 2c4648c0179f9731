"""From sampled tokens to Rollouts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmrl_core.contracts import GenerationRequest, Rollouts, TokenPolicy


def token_rollouts(
    policy: TokenPolicy,
    requests: Sequence[GenerationRequest],
    prompts: Sequence[Tensor],
    responses: Sequence[Tensor],
    log_probs: Sequence[Tensor],
    version: int,
) -> Rollouts:
    """The Rollouts of these requests, decoded.

    Args:
        prompts: [L] token ids, one a request.
        responses: [R] token ids up to and including the one that ended it, one a sample in the requests' order.
        log_probs: [R] fp32, of the tokens of `responses`.
        version: of the weights that sampled.
    """
    width = max((len(r) for r in responses), default=1)
    behaviour = torch.zeros(len(responses), width)
    mask = torch.zeros(len(responses), width, dtype=torch.bool)
    for row, chosen in enumerate(log_probs):
        behaviour[row, : len(chosen)] = chosen
        mask[row, : len(chosen)] = True
    eos = policy.eos_ids
    rollouts = Rollouts(
        group_id=torch.tensor([r.group_id for r in requests for _ in r.sample_ids], dtype=torch.int64),
        sample_id=torch.tensor([s for r in requests for s in r.sample_ids], dtype=torch.int64),
        mask=mask,
        behaviour_log_probs=behaviour,
        truncated=torch.tensor([int(r[-1]) not in eos for r in responses], dtype=torch.bool),
        policy_version=version,
        payload={
            "prompt_ids": [p for r, p in zip(requests, prompts, strict=True) for _ in r.sample_ids],
            "response_ids": list(responses),
        },
    )
    rollouts.samples = policy.decode(rollouts, requests)
    return rollouts
