"""mmrl's advantage estimators in verl's registry: `algorithm.adv_estimator=mmrl_dr_grpo` and so on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import register_adv_est

from mmrl_core.grpo.advantages import compute_advantages
from mmrl_core.recipe import AdvantageSpec

Name = Literal["grpo", "dr_grpo", "rloo", "global_std"]
Estimator = Callable[..., tuple[Tensor, Tensor]]


def estimator(name: Name) -> Estimator:
    """A function in the form that verl's registry takes."""
    spec = AdvantageSpec(name=name)

    def estimate(
        token_level_rewards: Tensor, response_mask: Tensor, index: Sequence[Any], config: Any = None, **others: Any
    ) -> tuple[Tensor, Tensor]:
        """(advantages, returns), both [N, T], the same here: a sample's reward is the sum of its tokens'."""
        rewards = token_level_rewards.double().sum(-1)
        groups = torch.from_numpy(np.unique(np.asarray(index), return_inverse=True)[1]).to(rewards.device)
        with torch.no_grad():
            found = compute_advantages(rewards, groups, torch.ones_like(rewards, dtype=torch.bool), spec)
        advantages = found.to(token_level_rewards.dtype)[:, None] * response_mask
        return advantages, advantages

    estimate.__name__ = estimate.__qualname__ = f"mmrl_{name}"
    return estimate


REGISTERED = {name: register_adv_est(f"mmrl_{name}")(estimator(name)) for name in get_args(Name)}
"""By mmrl's word."""
