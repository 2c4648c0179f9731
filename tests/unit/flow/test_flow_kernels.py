"""Kernels against the published formulas, written out step by step in float64 and in the papers' own order."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmrl_core.flow.kernels import (
    clean,
    gaussian_kl,
    guarded_log_prob,
    log_prob,
    mean_of,
    ode_table,
    step_table,
)
from mmrl_core.flow.schedule import linear_sigmas, network_time, trained_steps, window_start

STEPS = 16
NOISE = {"dance": 0.3, "flow": 0.7, "cps": 0.8}


def published_schedule(steps: int, shift: float) -> list[float]:
    plain = [1.0 - k / steps for k in range(steps + 1)]
    return [shift * s / (1 + (shift - 1) * s) for s in plain]


def published_step(
    kernel: str, noise: float, sigmas: list[float], step: int, x: Tensor, v: Tensor
) -> tuple[Tensor, float]:
    """(mean, std) of the next state, as each paper states it."""
    sigma, following = sigmas[step], sigmas[step + 1]
    dt = following - sigma
    if kernel == "dance":
        x0 = x - sigma * v
        score = -(x - (1 - sigma) * x0) / sigma**2
        return x + dt * v - 0.5 * noise**2 * score * dt, noise * math.sqrt(sigma - following)
    if kernel == "flow":
        denominator = 1 - (sigmas[1] if sigma == 1.0 else sigma)
        s = noise * math.sqrt(sigma / denominator)
        mean = x * (1 + s**2 / (2 * sigma) * dt) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
        return mean, s * math.sqrt(-dt)
    std = following * math.sin(noise * math.pi / 2)
    x0, e = x - sigma * v, x + (1 - sigma) * v
    return (1 - following) * x0 + e * math.sqrt(following**2 - std**2), std


def published_log_prob(kernel: str, following: Tensor, mean: Tensor, std: float) -> Tensor:
    per_element = -((following - mean) ** 2)
    if kernel != "cps":
        per_element = per_element / (2 * std**2) - math.log(std) - math.log(math.sqrt(2 * math.pi))
    return per_element.mean(dim=tuple(range(1, following.ndim)))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kernel", ["dance", "flow", "cps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_step_is_the_published_one(kernel: str, dtype: torch.dtype) -> None:
    sigmas = published_schedule(STEPS, 3.0)
    table = step_table(torch.tensor(sigmas, dtype=torch.float64), kernel, NOISE[kernel])  # type: ignore[arg-type]
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    for step in range(STEPS - 1):
        x, v = draw(5, 4, 6, 6, seed=step), draw(5, 4, 6, 6, seed=100 + step)
        mean, std = published_step(kernel, NOISE[kernel], sigmas, step, x, v)
        following = mean + std * draw(5, 4, 6, 6, seed=200 + step)
        expected = published_log_prob(kernel, following, mean, std)
        of_x, of_v = (c[step].expand(5) for c in (table.of_x, table.of_v))
        got = mean_of(of_x, of_v, x.to(dtype), v.to(dtype))
        assert got.dtype == dtype
        assert (got.double() - mean).norm() / mean.norm() < tolerance
        assert float(table.std[step]) == pytest.approx(std, rel=1e-12)
        chosen = log_prob(kernel, following.to(dtype), mean.to(dtype), table.std[step].expand(5))  # type: ignore[arg-type]
        # a sum of terms of size 1 that may cancel: relative to the terms
        size = 0.5 + abs(math.log(std)) if kernel != "cps" else std**2
        assert float((chosen.double() - expected).abs().max()) < max(tolerance, 3e-12) * size


def test_the_two_sdes_are_one_formula() -> None:
    """With g = eta(sigma) chosen so that both noises agree, Dance's step is Flow-GRPO's."""
    sigmas = torch.tensor(published_schedule(8, 3.0), dtype=torch.float64)
    step = 3
    g = 0.7 * math.sqrt(float(sigmas[step]) / (1 - float(sigmas[step])))
    flow, dance = step_table(sigmas, "flow", 0.7), step_table(sigmas, "dance", g)
    for name in ("of_x", "of_v", "std"):
        assert float(getattr(flow, name)[step]) == pytest.approx(float(getattr(dance, name)[step]), rel=1e-12)


@pytest.mark.parametrize("kernel", ["dance", "flow", "cps"])
def test_without_noise_every_kernel_is_the_euler_step(kernel: str) -> None:
    sigmas = linear_sigmas(10, 2.0)
    table, plain = step_table(sigmas, kernel, 0.0), ode_table(sigmas)  # type: ignore[arg-type]
    x, v = draw(3, 7), draw(3, 7, seed=1)
    for step in range(10):
        ours = mean_of(table.of_x[step].expand(3), table.of_v[step].expand(3), x, v)
        euler = x + (float(sigmas[step + 1]) - float(sigmas[step])) * v
        assert torch.allclose(ours, euler, rtol=0, atol=1e-12)
        assert torch.allclose(mean_of(plain.of_x[step].expand(3), plain.of_v[step].expand(3), x, v), euler, atol=1e-12)
        assert float(table.std[step]) == 0


def test_coefficients_are_preserved_by_cps() -> None:
    """Noise left and noise added together have the next level: var = sigma'^2."""
    sigmas = linear_sigmas(12, 3.0).double()
    table = step_table(sigmas, "cps", 0.6)
    for step in range(11):
        s, following = float(sigmas[step]), float(sigmas[step + 1])
        x = torch.tensor([[0.0]], dtype=torch.float64)
        left = float(table.of_x[step]) * s + float(table.of_v[step])  # x0 = 0, noise 1: x = sigma, v = 1
        assert x.numel()
        assert left**2 + float(table.std[step]) ** 2 == pytest.approx(following**2, rel=1e-9)


def test_guard_is_the_papers_exponent() -> None:
    """std (log p - log p_old + mean|dm|^2 / (2 std^2)), as a difference of two guarded log-probs."""
    std = torch.tensor([0.05, 0.2, 0.9], dtype=torch.float64)
    old, new = draw(3, 4, 5), draw(3, 4, 5) + 0.1 * draw(3, 4, 5, seed=2)
    following = old + std.view(-1, 1, 1) * draw(3, 4, 5, seed=3)

    def published(mean: Tensor) -> Tensor:
        return torch.stack(
            [published_log_prob("dance", following[i : i + 1], mean[i : i + 1], float(std[i]))[0] for i in range(3)]
        )

    bias = (new - old).square().flatten(1).mean(1) / (2 * std**2)
    expected = (published(new) - published(old) + bias) * std
    got = guarded_log_prob(following, new, std, old) - guarded_log_prob(following, old, std, old)
    assert torch.allclose(got, expected, rtol=1e-9, atol=1e-12)


def test_divergence_of_gaussians() -> None:
    a, b, std = draw(4, 3, 3), draw(4, 3, 3, seed=1), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    expected = [
        torch.distributions.kl_divergence(
            torch.distributions.Normal(a[i], float(std[i])), torch.distributions.Normal(b[i], float(std[i]))
        ).mean()
        for i in range(4)
    ]
    assert torch.allclose(gaussian_kl(a, b, std), torch.stack(expected), rtol=1e-12)


def test_log_prob_gradient_flows_through_the_mean() -> None:
    x, v, following = draw(2, 6), draw(2, 6, seed=1).requires_grad_(), draw(2, 6, seed=2)
    table = step_table(linear_sigmas(4, 3.0), "dance", 0.3)
    mean = mean_of(table.of_x[1].expand(2), table.of_v[1].expand(2), x, v)
    log_prob("dance", following, mean, table.std[1].expand(2)).sum().backward()
    std, of_v = float(table.std[1]), float(table.of_v[1])
    assert torch.allclose(v.grad, (following - mean.detach()) / std**2 * of_v / 6)


def test_clean_sample() -> None:
    x0, noise = draw(2, 5), draw(2, 5, seed=1)
    assert torch.allclose(clean(0.3 * x0 + 0.7 * noise, noise - x0, 0.7), x0)


@pytest.mark.parametrize("steps", [8, 12, 16, 25, 40])
def test_linear_schedule_and_quantised_time(steps: int) -> None:
    sigmas = linear_sigmas(steps, 3.0)
    assert torch.allclose(sigmas.double(), torch.tensor(published_schedule(steps, 3.0)).double(), atol=2e-7)
    quantised = network_time(sigmas, quantise=True)
    plain = torch.linspace(1, 0, steps + 1)
    reference = 3.0 * plain / (1 + 2.0 * plain)
    assert quantised.tolist() == [pytest.approx(int(s * 1000) / 1000, abs=1e-7) for s in reference], (
        "int(sigma * 1000) / 1000 on the fp32 schedule"
    )
    assert torch.equal(network_time(sigmas, quantise=False), sigmas)


def test_windows_lie_where_they_may_and_everywhere_there() -> None:
    starts = [window_start(1, 5, 2, seed) for seed in range(200)]
    assert set(starts) == {1, 2, 3, 4}
    assert window_start(1, 5, 2, 7) == window_start(1, 5, 2, 7)


def test_trained_steps_are_drawn_for_each_sample() -> None:
    chosen = trained_steps(15, 9, range(100), permute=True)
    assert chosen.shape == (100, 9)
    assert all(len(set(row.tolist())) == 9 for row in chosen)
    assert {int(i) for i in chosen.flatten()} == set(range(15))
    assert len({tuple(row.tolist()) for row in chosen}) > 90
    ordered = trained_steps(15, 9, range(100), permute=False)
    assert torch.equal(ordered, chosen.sort(dim=1).values)
    assert trained_steps(15, 9, [], permute=True).shape == (0, 9)
