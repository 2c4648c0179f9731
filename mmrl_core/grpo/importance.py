"""The mismatch between the engine that sampled and the network that is trained: measured always, corrected on demand.

Both compute log-probs of the same actions under nominally the same weights; kernels, precision and truncated sampling
make them differ. Samples come from `behaviour`, the loss speaks of `old`; old / behaviour is the importance ratio.

Sources: truncated importance sampling, Ionides (2008), as used for this mismatch by Yao et al., "Your Efficient RL
Framework Secretly Brings You Off-Policy RL Training" (2025); leaving actions out and sequence-level ratios, Liu et al.,
"When Speed Kills Stability: Demystifying RL Collapse from the Training-Inference Mismatch" (2025).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmrl_core.grpo.kl import MAX_EXPONENT, kl_estimate
from mmrl_core.recipe import ImportanceSpec


def importance_weights(
    old_log_probs: Tensor, behaviour_log_probs: Tensor, mask: Tensor, spec: ImportanceSpec
) -> tuple[Tensor, Tensor]:
    """Factors for the per-action policy loss, and which actions stay.

    Ratios: `token`: exp(old - behaviour) of the action; `sequence`: the same for each action of a row, the product of
    the row's ratios, exp(sum over the row's actions), which is the unbiased one and whose spread grows with length.
    Exponents are cut to +-20. Modes: `truncate`: min(ratio, cap), everything stays; `mask`: the ratio, and only
    actions (rows) with 1 / cap <= ratio <= cap stay. `off`: all ones.

    Args:
        old_log_probs: [b, t], recomputed before the update.
        behaviour_log_probs: [b, t], of the engine.
        mask: [b, t] bool; what stands elsewhere is never read.
        spec: the recipe's `algorithm.importance`.

    Returns:
        weights: [b, t] fp32, without gradient; 0 for actions that do not stay.
        keep: [b, t] bool, `mask` without the actions left out.
    """
    if spec.level == "off":
        return mask.to(torch.float32), mask
    ratio = _ratio(old_log_probs, behaviour_log_probs, mask, spec)
    if spec.mode == "truncate":
        return torch.where(mask, ratio.clamp(max=spec.cap), 0.0), mask
    keep = mask & ~_beyond(ratio, spec)
    return torch.where(keep, ratio, 0.0), keep


def corrected_fraction(
    old_log_probs: Tensor, behaviour_log_probs: Tensor, mask: Tensor, metric_weight: Tensor, spec: ImportanceSpec
) -> Tensor:
    """Metric `mismatch/corrected_fraction`: actions whose weight was cut to the cap, or that were left out.

    Arguments as for `importance_weights` (level not `off`) and `mismatch_metrics`. A scalar that adds up over
    micro-batches and replicas.
    """
    ratio = _ratio(old_log_probs, behaviour_log_probs, mask, spec)
    return torch.where(mask & _beyond(ratio, spec), metric_weight, 0.0).sum()


def mismatch_metrics(
    old_log_probs: Tensor, behaviour_log_probs: Tensor, mask: Tensor, metric_weight: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """How far the engine and the network are apart.

    Means over actions: `mismatch/kl` of behaviour - old, the k1 estimate of KL(behaviour || old); `mismatch/k3`, the
    k3 estimate of the same; `mismatch/ratio` of exp(old - behaviour), which is 1 in expectation; and
    `mismatch/log_prob_diff` of abs(old - behaviour). Maximum: `mismatch/log_prob_diff_max` of the last.

    Args:
        old_log_probs, behaviour_log_probs, mask: [b, t] as for `importance_weights`.
        metric_weight: [b, t], mask / (number of actions in the global minibatch).

    Returns:
        sums: fp32 scalars without gradient that add up over micro-batches and replicas.
        maxima: fp32 scalars without gradient, combined by maximum; 0 when there is no action.
    """
    old = torch.where(mask, old_log_probs.detach().float(), 0.0)
    behaviour = torch.where(mask, behaviour_log_probs.detach().float(), 0.0)
    weight = torch.where(mask, metric_weight, 0.0)
    difference = old - behaviour
    sums = {
        "mismatch/kl": -(weight * difference).sum(),
        "mismatch/k3": (weight * kl_estimate(behaviour, old, "k3")).sum(),
        "mismatch/ratio": (weight * difference.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()).sum(),
        "mismatch/log_prob_diff": (weight * difference.abs()).sum(),
    }
    largest = difference.abs().amax() if difference.numel() else difference.new_zeros(())
    return sums, {"mismatch/log_prob_diff_max": largest}


def _ratio(old_log_probs: Tensor, behaviour_log_probs: Tensor, mask: Tensor, spec: ImportanceSpec) -> Tensor:
    """[b, t] fp32 without gradient: old / behaviour of the action or of its row; 1 where not `mask` (token level)."""
    old = torch.where(mask, old_log_probs.detach().float(), 0.0)
    difference = old - torch.where(mask, behaviour_log_probs.detach().float(), 0.0)
    if spec.level == "sequence":
        difference = difference.sum(dim=1, keepdim=True).expand_as(difference)
    return difference.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()


def _beyond(ratio: Tensor, spec: ImportanceSpec) -> Tensor:
    """Where the correction does something to the ratio."""
    if spec.mode == "truncate":
        return ratio > spec.cap
    return (ratio > spec.cap) | (ratio < 1.0 / spec.cap)
