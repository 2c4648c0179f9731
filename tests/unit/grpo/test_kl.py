"""KL estimators against math on single numbers, and against a divergence known in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from mmrl_core.grpo.kl import kl_estimate

FORMULAS = {
    "k1": lambda d: d,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: math.expm1(-d) + d,
    "low_var_kl": lambda d: math.expm1(-d) + d,
    "abs": abs,
}
SLOPES = {
    "k1": lambda d: 1.0,
    "k2": lambda d: d,
    "k3": lambda d: -math.expm1(-d),
    "low_var_kl": lambda d: -math.expm1(-d),
    "abs": lambda d: math.copysign(1.0, d),
}


@pytest.mark.parametrize("estimator", FORMULAS)
def test_value_and_gradient_of_each_estimator(estimator):
    differences = [-15.0, -3.0, -0.5, -1e-2, -1e-3, 1e-3, 1e-2, 0.5, 3.0, 40.0]
    policy = torch.tensor(differences, requires_grad=True)
    value = kl_estimate(policy, torch.zeros(len(differences)), estimator)
    value.sum().backward()
    exact = [float(d) for d in policy.detach()]
    torch.testing.assert_close(
        value.detach().double(), torch.tensor([FORMULAS[estimator](d) for d in exact]).double(), rtol=1e-3, atol=1e-9
    )
    torch.testing.assert_close(
        policy.grad.double(), torch.tensor([SLOPES[estimator](d) for d in exact]).double(), rtol=1e-5, atol=1e-7
    )


def test_k3_keeps_its_sign_and_size_near_zero():
    # exp(-d) - 1 + d in fp32 gives 0 or even negative numbers here; the truth is d^2 / 2.
    d = torch.tensor([3e-4, -3e-4, 1e-3, -1e-3])
    naive = torch.exp(-d) - 1 + d
    value = kl_estimate(d, torch.zeros(4), "k3")
    truth = d.double().square() / 2
    assert ((value.double() - truth).abs() < 0.2 * truth).all()
    assert ((naive.double() - truth).abs() > 0.2 * truth).any()
    assert kl_estimate(torch.tensor([-5.0]), torch.tensor([-5.0]), "k3").item() == 0.0


@pytest.mark.parametrize("estimator", FORMULAS)
@pytest.mark.parametrize("gap", [-1000.0, -100.0, 100.0, 1000.0])
def test_far_apart_stays_finite(estimator, gap):
    policy = torch.tensor([gap], requires_grad=True)
    value = kl_estimate(policy, torch.zeros(1), estimator)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(policy.grad).all()
    if gap < -20 and estimator in ("k3", "low_var_kl"):
        assert value.item() == pytest.approx(math.exp(20) - 21, rel=1e-6)
        assert policy.grad.item() == 0.0


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased_estimators_average_to_the_divergence(estimator):
    policy = torch.log_softmax(torch.tensor([0.3, -1.0, 2.0, 0.0]), dim=0)
    reference = torch.log_softmax(torch.tensor([0.0, 0.5, 1.0, -0.2]), dim=0)
    divergence = (policy.double().exp() * (policy - reference).double()).sum()
    mean = (policy.exp() * kl_estimate(policy, reference, estimator)).sum()
    assert mean.item() == pytest.approx(divergence.item(), rel=1e-5)


def test_gradient_of_k2_is_that_of_the_divergence():
    reference = torch.log_softmax(torch.tensor([0.0, 0.5, 1.0]), dim=0)
    logits = torch.tensor([0.3, -1.0, 2.0], requires_grad=True)
    policy = torch.log_softmax(logits, dim=0)
    (exact,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)
    surrogate = (policy.exp().detach() * kl_estimate(policy, reference, "k2")).sum()
    (estimated,) = torch.autograd.grad(surrogate, logits)
    torch.testing.assert_close(estimated, exact, rtol=1e-5, atol=1e-6)


def test_half_precision_inputs_are_computed_in_fp32():
    assert kl_estimate(torch.tensor([-1.0], dtype=torch.bfloat16), torch.tensor([-2.0]), "k3").dtype == torch.float32
