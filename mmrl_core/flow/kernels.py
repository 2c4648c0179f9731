"""Stochastic steps of flow matching and their log-probs: one family of kernels.

A model of velocity v at x = x_sigma says what the clean sample and the noise are::

    x0 = x - sigma v        e = x + (1 - sigma) v        x_sigma = (1 - sigma) x0 + sigma e

Every step from sigma to s = sigma' < sigma keeps the clean part and replaces some of the noise::

    x' = (1 - s) x0 + c e + std z,   z ~ N(0, 1)

| kernel | std | c |
|---|---|---|
| ODE (noise 0) | 0 | s |
| `dance`, `flow` | g sqrt(sigma - s) | s - g^2 (sigma - s) / (2 sigma) |
| `cps` | s sin(noise pi / 2) | sqrt(s^2 - std^2) |

The first two are Euler-Maruyama steps of the reverse SDE with diffusion coefficient g(sigma): g = noise for DanceGRPO
(arXiv:2505.07818), g = noise sqrt(sigma / (1 - sigma)) for Flow-GRPO (arXiv:2505.05470, eq. 9), where 1 - sigma at the
first step, which is 0, takes the second sigma instead. Coefficients-preserving sampling (arXiv:2509.05952) makes the
noise that is left and the noise that is added have the level s together; to first order in the step it is the SDE
with g^2 = std^2 / (sigma - s).

Log-probs are *means* over a sample's elements, so that their size does not depend on the resolution. Coefficients are
computed in float64 and applied in the dtype of x, which is fp32 (or float64) whatever the network computes in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kernel = Literal["dance", "flow", "cps"]


@dataclass(frozen=True, kw_only=True)
class StepTable:
    """Coefficients of every step i of a schedule, [T] float64 each, for x_(i+1) = of_x x_i + of_v v + std z."""

    of_x: Tensor
    of_v: Tensor
    std: Tensor
    """0 where the step is deterministic."""
    size: Tensor
    """sigma - sigma' > 0."""

    @property
    def steps(self) -> int:
        """T."""
        return int(self.std.shape[0])


def step_table(sigmas: Tensor, kernel: Kernel, noise: float) -> StepTable:
    """Coefficients for a schedule.

    Args:
        sigmas: [T + 1], strictly decreasing, from at most 1 to at least 0.
        kernel: see the module's table.
        noise: noise level; 0: every step is the ODE's.
    """
    levels = sigmas.double()
    sigma, following = levels[:-1], levels[1:]
    size = sigma - following
    assert bool((size > 0).all()), f"sigmas must decrease: {sigmas.tolist()}"
    if kernel == "cps":
        std = following * math.sin(noise * math.pi / 2)
        of_noise = (following.square() - std.square()).sqrt()
    else:
        if kernel == "dance":
            g = torch.full_like(sigma, noise)
        else:
            g = noise * (sigma / (1.0 - torch.where(sigma == 1.0, levels[1], sigma))).sqrt()
        std = g * size.sqrt()
        of_noise = following - g.square() * size / (2.0 * sigma)
    of_clean = 1.0 - following
    return StepTable(of_x=of_clean + of_noise, of_v=of_noise * (1.0 - sigma) - of_clean * sigma, std=std, size=size)


def ode_table(sigmas: Tensor) -> StepTable:
    """Coefficients of the deterministic steps x' = x + (sigma' - sigma) v."""
    levels = sigmas.double()
    change = levels[1:] - levels[:-1]
    return StepTable(of_x=torch.ones_like(change), of_v=change, std=torch.zeros_like(change), size=-change)


def mean_of(of_x: Tensor, of_v: Tensor, x: Tensor, velocity: Tensor) -> Tensor:
    """The next state's mean [b, ...]. `of_x` and `of_v`: [b], any dtype."""
    return _like(of_x, x) * x + _like(of_v, x) * velocity.to(x.dtype)


def clean(x: Tensor, velocity: Tensor, sigma: float) -> Tensor:
    """x0 = x - sigma v, what the model believes the clean sample to be."""
    return x - sigma * velocity.to(x.dtype)


def log_prob(kernel: Kernel, following: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """[b]: mean over elements of log N(following; mean, std), for `cps` of -(following - mean)^2 as it is published.

    Args:
        following, mean: [b, ...].
        std: [b], positive.
    """
    square = (following - mean).square().flatten(1).mean(1)
    if kernel == "cps":
        return -square
    std = std.to(square.dtype)
    return -square / (2.0 * std.square()) - std.log() - 0.5 * math.log(2.0 * math.pi)


def guarded_log_prob(following: Tensor, mean: Tensor, std: Tensor, recorded_mean: Tensor) -> Tensor:
    """[b]: GRPO-Guard's normalised log-ratio as a log-prob, so that differences of two are what its clip sees.

    With the mean m0 at sampling time the paper's ratio (arXiv:2510.22319, eq. 8) is
    exp(std (log p - log p0 + mean|m - m0|^2 / (2 std^2))), the mean taken over elements. Its exponent equals
    mean(z (m - m0)) with z = (following - m0) / std: linear in m, of mean 0 and of a spread that does not depend on
    std. The part without m is left out: it cancels in every difference, and rounding with it.

    Args:
        following, mean, recorded_mean: [b, ...]; std: [b], positive.
    """
    z = (following - recorded_mean) / _like(std, following)
    return (z * (mean - recorded_mean)).flatten(1).mean(1)


def gaussian_kl(mean: Tensor, reference_mean: Tensor, std: Tensor) -> Tensor:
    """[b]: KL of two Gaussians of one std, |m - m_ref|^2 / (2 std^2), mean over elements like the log-probs."""
    return (mean - reference_mean).square().flatten(1).mean(1) / (2.0 * std.to(mean.dtype).square())


def _like(values: Tensor, x: Tensor) -> Tensor:
    """[b] as [b, 1, ...] in x's dtype and place."""
    return values.to(x.device, x.dtype).view(-1, *([1] * (x.ndim - 1)))
