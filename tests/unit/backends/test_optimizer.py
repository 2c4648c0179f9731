"""Learning rates against closed forms, and the guard against gradients that are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mmrl_core.backends.optimizer import AdamW, global_norm, learning_rate
from mmrl_core.devices.cpu import CpuDevice
from mmrl_core.errors import BackendError
from mmrl_core.recipe import OptimizerSpec


def test_constant_after_linear_warm_up() -> None:
    spec = OptimizerSpec(lr=2.0, warmup_updates=4)
    rates = [learning_rate(spec, i, 10) for i in range(10)]
    assert rates == [0.5, 1.0, 1.5, 2.0, *[2.0] * 6]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedules_start_at_the_peak_and_end_at_the_floor(schedule: str) -> None:
    spec = OptimizerSpec(lr=3.0, schedule=schedule, warmup_updates=2, min_lr_ratio=0.1)
    assert learning_rate(spec, 2, 12) == pytest.approx(3.0)
    assert learning_rate(spec, 7, 12) == pytest.approx(3.0 * 0.55), "both are half-way at half time"
    assert learning_rate(spec, 12, 12) == pytest.approx(0.3)
    assert learning_rate(spec, 99, 12) == pytest.approx(0.3)
    quarter = 0.5 * (1 + math.cos(math.pi / 4)) if schedule == "cosine" else 0.75
    assert learning_rate(spec, 7, 22) == pytest.approx(3.0 * (0.1 + 0.9 * quarter))


def module_and_optimizer(**spec: object) -> tuple[nn.Module, AdamW]:
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    return module, AdamW(list(module.parameters()), OptimizerSpec(**spec), 10, CpuDevice())


def test_clipping_and_decay_equal_torchs_own() -> None:
    module, optimizer = module_and_optimizer(lr=0.1, weight_decay=0.3, clip_grad=0.5)
    other = nn.Linear(3, 2)
    other.load_state_dict(module.state_dict())
    reference = torch.optim.AdamW(
        [{"params": [other.weight], "weight_decay": 0.3}, {"params": [other.bias], "weight_decay": 0.0}], lr=0.1
    )
    for _ in range(3):
        x = torch.randn(4, 3) * 5
        for m in (module, other):
            m.zero_grad()
            m(x).square().sum().backward()
        norm = global_norm(list(module.parameters()))
        assert float(norm) == pytest.approx(math.sqrt(sum(float(p.grad.square().sum()) for p in other.parameters())))
        assert optimizer.step(norm)
        nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        reference.step()
    assert torch.allclose(module.weight, other.weight, rtol=1e-5, atol=1e-6)
    assert torch.allclose(module.bias, other.bias, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing_and_finally_stops(bad: float) -> None:
    module, optimizer = module_and_optimizer(lr=0.1, max_skipped_updates=2)
    before = [p.clone() for p in module.parameters()]
    for p in module.parameters():
        p.grad = torch.full_like(p, bad)
    assert not optimizer.step(global_norm(optimizer.parameters))
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert all(p.grad is None for p in module.parameters())
    for p in module.parameters():
        p.grad = torch.full_like(p, bad)
    with pytest.raises(BackendError, match="2 updates in a row"):
        optimizer.step(global_norm(optimizer.parameters))
