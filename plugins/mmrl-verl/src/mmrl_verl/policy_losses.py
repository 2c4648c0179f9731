"""verl's policy losses as the policy-gradient term of mmrl's loss.

verl's functions aggregate over the micro-batch that they see. Here an action's weight is counted over the whole
minibatch beforehand, so it is passed as verl's `rollout_is_weights`, with an aggregation whose normaliser is 1. Whether
a function then really is the weighted sum that does not depend on how work is cut is tried when it is chosen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmrl_core.contracts import PolicyGradient
from mmrl_core.errors import BackendError, nearest
from mmrl_verl.estimators import import_registrars

if TYPE_CHECKING:
    from mmrl_core.recipe import LossSpec
    from mmrl_verl.algorithm_options import VerlLossOptions

FIELD = "algorithm.loss.plugin"
FRACTIONS = ("actor/pg_clipfrac", "actor/pg_clipfrac_lower")
CLOSE = 1e-5
"""Relative difference up to which two ways of cutting the work are equal, in the trial."""


class VerlPolicyGradient(PolicyGradient):
    """`verl.trainer.ppo.core_algos.get_policy_loss_fn(NAME)`."""

    options: VerlLossOptions
    scope = "sequence"
    """Some of them look at whole rows, and text is replayed in whole rows anyway."""

    def __init__(self, options: VerlLossOptions, spec: LossSpec) -> None:
        """Raises BackendError when verl has no such loss, or when it is no sum over rows."""
        super().__init__(options, spec)
        import_registrars(options.import_modules, FIELD)
        from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
        from verl.workers.config import FSDPActorConfig, PolicyLossConfig

        name = options.loss
        if name not in POLICY_LOSS_REGISTRY:
            known = sorted(POLICY_LOSS_REGISTRY)
            raise BackendError(
                f"{FIELD}: verl has no policy loss {name!r}.{nearest(name, known)} It has: {', '.join(known)}"
            )
        if name == "dro" and options.dro_beta is None:
            raise BackendError(f"{FIELD}: verl's loss dro needs dro_beta")
        high = spec.clip_low if spec.clip_high is None else spec.clip_high
        dual = {} if spec.dual_clip is None else {"clip_ratio_c": spec.dual_clip}
        self._function: Any = POLICY_LOSS_REGISTRY[name]
        self._config = FSDPActorConfig(
            strategy="fsdp2",
            rollout_n=1,
            ppo_micro_batch_size_per_gpu=1,
            clip_ratio=spec.clip_low,
            clip_ratio_low=spec.clip_low,
            clip_ratio_high=high,
            tau_pos=options.tau_pos,
            tau_neg=options.tau_neg,
            policy_loss=PolicyLossConfig(loss_mode=name, dro_beta=options.dro_beta),
            global_batch_info={"dp_size": 1, "batch_num_tokens": 1, "global_batch_size": 1, "loss_scale_factor": 1},
            **dual,
        )
        self._over_length = False
        self._over_length = self._tried()

    def term(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, weight: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See PolicyGradient."""
        counted = mask.to(log_probs.dtype)
        if self._over_length:  # it divides each row by its length whatever aggregation is asked for
            weight = weight * counted.sum(-1, keepdim=True)
        loss, metrics = self._function(
            old_log_prob=old_log_probs,
            log_prob=log_probs,
            advantages=advantages,
            response_mask=counted,
            loss_agg_mode="token-mean",
            config=self._config,
            rollout_is_weights=weight,
        )
        fractions = {name: torch.tensor(metrics[name]) for name in FRACTIONS if name in metrics}
        return loss, {name: value.to(log_probs.device) for name, value in fractions.items()}

    def _tried(self) -> bool:
        """Whether it divides rows by their lengths. Raises BackendError when it is no weighted sum over rows."""
        name = self.options.loss
        draw = torch.Generator().manual_seed(0)

        def noise() -> Tensor:
            return torch.randn(6, 5, generator=draw, dtype=torch.float64)

        lengths = torch.tensor([5, 3, 1, 4, 2, 5])
        mask = torch.arange(5) < lengths[:, None]
        # spread so wide that losses which look at extremes of a batch find some
        old = -4.0 + 2.0 * noise()
        now, weight = old + 0.3 * noise(), 0.1 + noise().abs()
        advantages = 3.0 * noise()[:, :1].expand(6, 5)

        def value(rows: slice, factor: float = 1.0) -> float:
            parts = (t[rows] for t in (now, old, advantages, mask, weight * factor))
            return float(self.term(*(p.where(mask[rows], p.new_zeros(())) for p in parts))[0])

        try:
            whole, doubled = value(slice(0, 6)), value(slice(0, 6), 2.0)
            cut = value(slice(0, 2)) + value(slice(2, 6))
        except Exception as error:
            raise BackendError(f"{FIELD}: verl's loss {name!r} cannot be computed: {error}") from error
        size = CLOSE * max(1.0, abs(whole))
        if abs(doubled - 2 * whole) > size or abs(cut - whole) > size:
            raise BackendError(
                f"{FIELD}: verl's loss {name!r} depends on which rows are in one micro-batch, or ignores their "
                "weights, and mmrl's losses are sums that do not depend on how work is cut. Use another"
            )
        return self._divides_by_length(old[:1], advantages[:1])

    def _divides_by_length(self, log_probs: Tensor, advantages: Tensor) -> bool:
        """Whether an action's term is smaller in a longer row, with equal ratios of 1."""
        every = torch.ones(1, 5, dtype=torch.bool)
        first = torch.zeros(1, 5, dtype=torch.bool)
        first[0, 0] = True
        weight = first.double()
        in_five = float(self.term(log_probs, log_probs, advantages, every, weight)[0])
        alone = float(self.term(log_probs, log_probs, advantages, first, weight)[0])
        if abs(in_five - alone) <= CLOSE * max(1.0, abs(alone)):
            return False
        if abs(5 * in_five - alone) <= CLOSE * max(1.0, abs(alone)):
            return True
        raise BackendError(f"{FIELD}: verl's loss {self.options.loss!r} weighs actions in a way that is not understood")
