"""Per-action estimators of the divergence KL(policy || reference) from log-probs of sampled actions.

Source: J. Schulman, "Approximating KL Divergence" (2020), http://joschu.net/blog/kl-approx.html. Actions are sampled
from the policy; with d = log policy - log reference:

| estimator | value | as a penalty on rewards | as a term of the loss |
|---|---|---|---|
| `k1` | d | unbiased, noisy, may be negative | its gradient has mean 0: no regularisation on policy |
| `k2` | d^2 / 2 | biased, low variance | its gradient on policy is that of the divergence |
| `k3`, `low_var_kl` | exp(-d) - 1 + d | unbiased, low variance, never negative | GRPO's choice; biased gradient |
| `abs` | abs(d) | biased | constant pull towards the reference |
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KlEstimator = Literal["k1", "k2", "k3", "low_var_kl", "abs"]

MAX_EXPONENT = 20.0
"""Largest exponent of k3 and of every probability ratio: exp(20) = 4.9e8 still leaves fp32 room for sums."""


def kl_estimate(log_probs: Tensor, reference_log_probs: Tensor, estimator: KlEstimator) -> Tensor:
    """Estimate KL(policy || reference) for each action; see the module's table.

    Numerics, in fp32: k3 is expm1(-d) - (-d), which keeps its relative precision near d = 0, where exp(-d) - 1 + d
    cancels to noise. Its -d is cut at 20 from above: there the value stays at exp(20) - 21 and the gradient is 0, where
    it would soon overflow (an action that the policy drew although the reference finds it e^20 times likelier).
    Nothing is cut from below, where k3 grows like d. The other estimators need no care.

    Args:
        log_probs: any shape, of the policy; gradient flows through it.
        reference_log_probs: the same shape, of the frozen reference.
        estimator: the recipe's `algorithm.kl.estimator`.

    Returns:
        fp32, the shape of `log_probs`.
    """
    difference = log_probs.float() - reference_log_probs.float()
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    if estimator == "abs":
        return difference.abs()
    assert estimator in ("k3", "low_var_kl"), estimator
    exponent = (-difference).clamp(max=MAX_EXPONENT)
    return torch.expm1(exponent) - exponent
