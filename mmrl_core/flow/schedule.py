"""Noise levels of a denoising run and which of its steps are stochastic and trained. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def linear_sigmas(steps: int, shift: float) -> Tensor:
    """[steps + 1] fp32: from 1 to 0 in equal parts, then s -> shift s / (1 + (shift - 1) s).

    Source: the time shift of Esser et al., arXiv:2403.03206, eq. 23; DanceGRPO (arXiv:2505.07818) samples so.
    """
    sigmas = torch.linspace(1.0, 0.0, steps + 1)
    return shift * sigmas / (1.0 + (shift - 1.0) * sigmas)


def network_time(sigmas: Tensor, *, quantise: bool) -> Tensor:
    """The time that the network sees: sigma, or floor(1000 sigma) / 1000 computed in fp32 as DanceGRPO trains."""
    return torch.floor(sigmas * 1000.0) / 1000.0 if quantise else sigmas


def window_start(first: int, last: int, size: int, seed: int) -> int:
    """Where a group's stochastic window of `size` steps begins, uniformly between `first` and `last - size + 1`."""
    places = last - size + 1 - first + 1
    assert places >= 1, (first, last, size)
    return first + int(torch.randint(places, (1,), generator=torch.Generator().manual_seed(seed)))


def trained_steps(stochastic: int, trained: int, seeds: Sequence[int], *, permute: bool) -> Tensor:
    """[b, trained] int64: which of the stochastic steps 0..stochastic-1 each sample trains.

    With fewer trained than stochastic steps every sample draws its own; without `permute` they are in order of time.
    """
    rows = []
    for seed in seeds:
        order = torch.randperm(stochastic, generator=torch.Generator().manual_seed(seed))[:trained]
        rows.append(order if permute else order.sort().values)
    return torch.stack(rows) if rows else torch.zeros((0, trained), dtype=torch.int64)
