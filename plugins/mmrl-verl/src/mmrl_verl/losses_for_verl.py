"""mmrl's policy-gradient terms in verl's registry: `actor_rollout_ref.actor.policy_loss.loss_mode=mmrl_gspo`.

Clipping and aggregation come from verl's configuration: `clip_ratio_low`, `clip_ratio_high`, for `mmrl_ppo_clip` also
`clip_ratio_c` (the dual clip), `loss_agg_mode`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss

from mmrl_core.grpo.losses import clipped_surrogate, probability_ratio

Name = Literal["ppo_clip", "gspo"]
PolicyLossFunction = Callable[..., tuple[Tensor, dict[str, Any]]]


def policy_loss(name: Name) -> PolicyLossFunction:
    """A function in the form that verl's registry takes."""

    def compute(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """(loss, metrics) of one micro-batch, all [b, t]."""
        mask = response_mask > 0
        current, old, factor = (torch.where(mask, t.float(), 0.0) for t in (log_prob, old_log_prob, advantages))
        surrogate, clipped, bounded = clipped_surrogate(
            probability_ratio(current, old, mask, whole_rows=name == "gspo"),
            factor,
            clip_low=config.clip_ratio_low,
            clip_high=config.clip_ratio_high,
            dual_clip=config.clip_ratio_c if name == "ppo_clip" else None,
        )
        if rollout_is_weights is not None:
            surrogate = surrogate * torch.where(mask, rollout_is_weights, 0.0)
        loss = agg_loss(
            loss_mat=surrogate, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info
        )
        actions = mask.sum().clamp(min=1)
        bounded = torch.zeros_like(clipped) if bounded is None else bounded
        return loss, {
            "actor/pg_clipfrac": float((clipped & mask).sum() / actions),
            "actor/ppo_kl": float((old - current).detach().sum() / actions),
            "actor/pg_clipfrac_lower": float((bounded & mask).sum() / actions),
        }

    compute.__name__ = compute.__qualname__ = f"mmrl_{name}"
    return compute


REGISTERED = {name: register_policy_loss(f"mmrl_{name}")(policy_loss(name)) for name in get_args(Name)}
"""By mmrl's word."""
