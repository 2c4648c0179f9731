"""Denoising a batch of rows, some steps stochastic: the loop of every flow-matching rollout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmrl_core.flow.kernels import Kernel, StepTable, clean, log_prob, mean_of

Velocity = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(latents [r, ...] fp32, time [r] fp32, rows) -> velocity [r, ...] fp32. `rows`: which rows of the batch these are, in
int64 on the latents' device; None: all of them, in order."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """What the rows of a batch do, step by step; rows may have their stochastic steps in different places."""

    sigmas: Tensor
    """[T + 1] fp32."""
    times: Tensor
    """[T + 1] fp32: what the network sees."""
    stochastic: StepTable
    """Coefficients of steps within a row's window."""
    deterministic: StepTable
    """Coefficients of all others."""
    kernel: Kernel
    starts: Tensor
    """[b] int64: each row's first stochastic step."""
    length: int
    """S: stochastic steps of each row, which never include the last step; 0: none."""
    guard: bool
    """Record means instead of log-probs, as GRPO-Guard needs them."""
    alike: Tensor | None = None
    """[b] int64: adjacent rows with one number have one initial noise, one window and one set of conditions. They are
    one row until noise parts them, and the network computes them once. None: it computes every row."""


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """On the CPU."""

    states: Tensor
    """[b, S + 1, ...] fp32: before each stochastic step, and after the last."""
    log_probs: Tensor
    """[b, S] fp32; 0 with `guard`, whose log-probs are measured from the recorded means."""
    means: Tensor | None
    """[b, S, ...] fp32, with `guard`."""
    final: Tensor
    """[b, ...] fp32: the model's x0 in the last step, in which no noise is left."""


def denoise(velocity: Velocity, start: Tensor, noise: Tensor, course: Course) -> Trajectory:
    """Run all T steps.

    Args:
        velocity: the network.
        start: [b, ...] fp32, the initial noise, where the network computes.
        noise: [b, S, ...] fp32 of the rows' stochastic steps, anywhere.
    """
    device, rows, width, total = start.device, start.shape[0], course.length, course.deterministic.steps
    steps = torch.arange(total)
    inside = (course.starts[:, None] <= steps) & (steps < course.starts[:, None] + width)  # [b, T]
    assert not inside[:, -1].any(), "the last step is never stochastic"
    of_x, of_v, std = (
        torch.where(inside, getattr(course.stochastic, name), getattr(course.deterministic, name)).float().to(device)
        for name in ("of_x", "of_v", "std")
    )
    noise = noise.to(device)
    states = start.new_empty((rows, width + 1 if width else 0, *start.shape[1:]))
    means = start.new_empty((rows, width, *start.shape[1:])) if course.guard else None
    log_probs = start.new_zeros((rows, width))
    x = start
    for step in range(total):
        before = _places(course.starts, step, width + 1 if width else 0)
        if before is not None:
            states[before] = x if len(before[0]) == rows else x[before[0]]
        v = _shared_velocity(velocity, x, step, course)
        if step == total - 1:
            break
        x = mean_of(of_x[:, step], of_v[:, step], x, v)
        here = _places(course.starts, step, width)
        if here is None:
            continue
        row = here[0]
        mean, deviation = x[row], std[row, step]
        moved = mean + deviation.view(-1, *([1] * (x.ndim - 1))) * noise[here]
        if means is not None:
            means[here] = mean
        else:
            log_probs[here] = log_prob(course.kernel, moved, mean, deviation)
        x = moved if len(row) == rows else x.index_copy(0, row.to(device), moved)
    return Trajectory(
        states=states.cpu(),
        log_probs=log_probs.cpu(),
        means=None if means is None else means.cpu(),
        final=clean(x, v, float(course.sigmas[-2])).cpu(),
    )


def _shared_velocity(velocity: Velocity, x: Tensor, step: int, course: Course) -> Tensor:
    """[b, ...]: the velocity of every row, computed once for rows that no noise has parted yet."""
    time, shared = course.times[step].to(x.device), _undivided(course, step)
    if shared is None:
        return velocity(x, time.expand(len(x)), None)
    first, place = (index.to(x.device) for index in shared)
    return velocity(x[first], time.expand(len(first)), first)[place]


def _undivided(course: Course, step: int) -> tuple[Tensor, Tensor] | None:
    """(rows that differ from the row before them, of each row the place of its own among those); None: all differ.

    The noise of a row's first stochastic step is added after that step's velocity, which is thus shared too.
    """
    rows = len(course.starts)
    if course.alike is None or not rows:
        return None
    parted = (course.starts < step) & (course.length > 0)
    labels = torch.where(parted, -1 - torch.arange(rows), course.alike)
    _, place, counts = torch.unique_consecutive(labels, return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - counts, place) if len(counts) < rows else None


def _places(starts: Tensor, step: int, width: int) -> tuple[Tensor, Tensor] | None:
    """(rows, positions) of the rows whose window of `width` places contains `step`; None: no row's does."""
    rows = torch.nonzero((starts <= step) & (step < starts + width)).flatten()
    return (rows, step - starts[rows]) if len(rows) else None


def draw_noise(seeds: Sequence[int], count: int, shape: Sequence[int]) -> Tensor:
    """[b, count, *shape] fp32 standard normal, each row from its own seed: the same whatever else is in the batch."""
    drawn = [torch.randn((count, *shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(drawn) if drawn else torch.zeros((0, count, *shape))
