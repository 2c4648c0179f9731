"""The policy-gradient loss: one per-action formula for PPO-style clipping and GSPO, its regularisers and its metrics.

Per action, with A the sample's advantage and r a probability ratio current / old::

    pg = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))      PPO; asymmetric: DAPO
    pg = min(pg, -A dual_clip)   where A < 0                     dual clip
    loss = sum of weight * (importance * policy's factor * pg + kl_coef * kl - entropy_coef * entropy)

- `ppo_clip`: r is the action's own ratio.
- `gspo`: r is the row's s = exp(mean of the row's log-ratios), in the token form of the paper (GSPO-token, its
  section 4.3): s_t = sg[s] * p_t / sg[p_t], where sg stops the gradient. The value is s for every action and the
  gradient with respect to the action's log-prob is s. All aggregations weight the actions of a row equally, and under
  equal weights this is plain GSPO: with `seq-mean-token-mean`, the paper's objective, both give
  -A s / (rows * actions of the row) for each action of an unclipped row. Token-level importance weights, which differ
  within a row, act on their own action only.

Sources: PPO, Schulman et al., arXiv:1707.06347, eq. 7; dual clip, Ye et al., arXiv:1912.09729; asymmetric clip,
Yu et al. (DAPO), arXiv:2503.14476, section 3.1; GSPO, Zheng et al., arXiv:2507.18071, eqs. 5 to 7 and 13 to 17.

Numerics: everything in fp32; log-ratios are cut to +-20, outside of which the gradient is 0. Inputs are replaced where
`mask` is False *before* they are used, so that NaN or inf there reaches neither values nor gradients. Nothing waits for
the device.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mmrl_core.contracts import ActionStats, LossBatch, LossOutput, PolicyGradient
from mmrl_core.grpo.importance import corrected_fraction, importance_weights, mismatch_metrics
from mmrl_core.grpo.kl import MAX_EXPONENT, kl_estimate
from mmrl_core.recipe import AlgorithmSpec


def build_loss(algorithm: AlgorithmSpec, policy_gradient: PolicyGradient | None = None) -> PolicyLoss:
    """The loss that a recipe's `algorithm` section asks for, with a plugin's policy-gradient term or a built-in one."""
    assert (policy_gradient is None) == (algorithm.loss.plugin is None), algorithm.loss.plugin
    return PolicyLoss(algorithm, policy_gradient)


class PolicyLoss:
    """The loss of a recipe; implements `mmrl_core.contracts.Loss`.

    Metrics, all without gradient. Weighted like the loss: `actor/pg_loss`, and `actor/kl_loss` when there is a
    divergence to measure, so that loss = pg_loss + coef * kl_loss - entropy_coef * (entropy, aggregated likewise).
    Means over actions: `actor/pg_clipfrac`, where the clipped term was taken; `actor/pg_clipfrac_lower`, where the
    dual clip was (only when it is on); `actor/ppo_kl` of old - current; `actor/entropy`, when the policy gives it; and
    `mismatch/*`, see `mmrl_core.grpo.importance`.
    """

    scope: Literal["action", "sequence"]
    """`sequence` for GSPO and for sequence-level importance weights, which need whole rows, or as a plugin says."""
    entropy_gradient: bool
    """True when there is an entropy bonus."""

    def __init__(self, algorithm: AlgorithmSpec, policy_gradient: PolicyGradient | None = None) -> None:
        self._plugin = policy_gradient
        self._spec = algorithm.loss
        self._importance = algorithm.importance
        self._estimator = algorithm.kl.estimator
        self._kl_coef = algorithm.kl.coef if algorithm.kl.where == "loss" else 0.0
        self._clip_high = self._spec.clip_low if self._spec.clip_high is None else self._spec.clip_high
        whole_rows = self._spec.name == "gspo" if policy_gradient is None else policy_gradient.scope == "sequence"
        whole_rows = whole_rows or self._importance.level == "sequence"
        self.scope = "sequence" if whole_rows else "action"
        self.entropy_gradient = self._spec.entropy_coef != 0.0

    def __call__(self, stats: ActionStats, batch: LossBatch) -> LossOutput:
        """The loss of some rows and actions: [b, t] tensors, or whole rows when `scope` is `sequence`."""
        mask = batch.mask
        log_probs = _where(mask, stats.log_probs)
        current = log_probs.detach()
        old = current if batch.old_log_probs is None else _where(mask, batch.old_log_probs).detach()
        metric_weight = _where(mask, batch.metric_weight)
        advantages = _where(mask, batch.advantages[:, None].expand(mask.shape))

        factor, keep = importance_weights(old, batch.behaviour_log_probs, mask, self._importance)
        # An action left out by the correction leaves every term; the normaliser, counted beforehand, still has it.
        weight = _where(keep, batch.weight)

        if stats.weight is not None:
            factor = factor * _where(mask, stats.weight).detach()
        if self._plugin is None:
            per_action, sums = self._policy_gradient(log_probs, old, advantages, mask, metric_weight)
            loss = (weight * factor * per_action).sum()
        else:
            loss, fractions = self._plugin.term(log_probs, old, advantages, mask, weight * factor)
            sums = {name: value.detach() * metric_weight.sum() for name, value in fractions.items()}
        sums["actor/pg_loss"] = loss.detach()
        sums["actor/ppo_kl"] = (metric_weight * (old - current)).sum()

        divergence = self._divergence(stats, log_probs, batch)
        if divergence is not None:
            kl_loss = (weight * divergence).sum()
            sums["actor/kl_loss"] = kl_loss.detach()
            if self._kl_coef != 0.0:
                loss = loss + self._kl_coef * kl_loss
        assert divergence is not None or self._kl_coef == 0.0, "a KL term without a reference"

        if stats.entropy is not None:
            entropy = _where(mask, stats.entropy)
            sums["actor/entropy"] = (metric_weight * entropy.detach()).sum()
            if self.entropy_gradient:
                loss = loss - self._spec.entropy_coef * (weight * entropy).sum()
        assert stats.entropy is not None or not self.entropy_gradient, "an entropy bonus without entropy"

        mismatch, maxima = mismatch_metrics(old, batch.behaviour_log_probs, mask, metric_weight)
        sums.update(mismatch)
        if self._importance.level != "off":
            sums["mismatch/corrected_fraction"] = corrected_fraction(
                old, batch.behaviour_log_probs, mask, metric_weight, self._importance
            )
        return LossOutput(loss=loss, sums=sums, maxima=maxima)

    def _policy_gradient(
        self, log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, metric_weight: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The clipped surrogate of each action, [b, t], and the fractions clipped."""
        spec = self._spec
        ratio = probability_ratio(log_probs, old, mask, whole_rows=spec.name == "gspo")
        surrogate, clipped, bounded = clipped_surrogate(
            ratio, advantages, clip_low=spec.clip_low, clip_high=self._clip_high, dual_clip=spec.dual_clip
        )
        sums = {"actor/pg_clipfrac": torch.where(clipped, metric_weight, 0.0).sum()}
        if bounded is not None:
            sums["actor/pg_clipfrac_lower"] = torch.where(bounded, metric_weight, 0.0).sum()
        return surrogate, sums

    def _divergence(self, stats: ActionStats, log_probs: Tensor, batch: LossBatch) -> Tensor | None:
        """[b, t] divergence from the reference: the policy's own, else estimated, else None."""
        if stats.kl is not None:
            return _where(batch.mask, stats.kl)
        if batch.reference_log_probs is None:
            return None
        return kl_estimate(log_probs, _where(batch.mask, batch.reference_log_probs), self._estimator)


def probability_ratio(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor, *, whole_rows: bool) -> Tensor:
    """[b, t]: current / old of the action, or, with `whole_rows`, of its row in GSPO's sense. Exactly 1 when both are
    equal. All [b, t]; log-probs are 0 where not `mask`."""
    log_ratio = log_probs - old_log_probs
    if whole_rows:
        lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
        row = log_ratio.detach().sum(dim=1, keepdim=True) / lengths
        log_ratio = row + (log_probs - log_probs.detach())
    return log_ratio.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, dual_clip: float | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of each action, [b, t]: the surrogate, whether the clipped term was taken, and whether the dual clip was (None
    when it is off)."""
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    surrogate = torch.maximum(plain, clipped)
    if dual_clip is None:
        return surrogate, clipped > plain, None
    bound = -advantages * dual_clip
    bounded = (advantages < 0) & (surrogate > bound)
    return torch.where(bounded, bound, surrogate), clipped > plain, bounded


def _where(mask: Tensor, values: Tensor) -> Tensor:
    """fp32 values, and 0 without gradient where not `mask`."""
    return torch.where(mask, values.float(), 0.0)
