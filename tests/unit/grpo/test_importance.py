"""Rollout / training mismatch against a transcription in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from mmrl_core.grpo.importance import corrected_fraction, importance_weights, mismatch_metrics
from mmrl_core.recipe import ImportanceSpec

SPECS = [
    ImportanceSpec(level=level, mode=mode, cap=cap)
    for level in ("token", "sequence")
    for mode in ("truncate", "mask")
    for cap in (1.2, 2.0)
]


def drawn(seed, rows=6, width=7, spread=0.5):
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(rows, width, generator=generator) * 3
    behaviour = old + spread * torch.randn(rows, width, generator=generator)
    mask = torch.rand(rows, width, generator=generator) < 0.7
    mask[0] = False
    return old, behaviour, mask


def transcription(old, behaviour, mask, spec):
    weights, keep, corrected = [], [], []
    for o_row, b_row, m_row in zip(old.tolist(), behaviour.tolist(), mask.tolist(), strict=True):
        terms = [o - b for o, b, m in zip(o_row, b_row, m_row, strict=True) if m]
        w_row, k_row, c_row = [], [], []
        for o, b, m in zip(o_row, b_row, m_row, strict=True):
            ratio = 0.0
            if m:
                ratio = math.exp(math.fsum(terms)) if spec.level == "sequence" else math.exp(o - b)
            outside = m and (ratio > spec.cap or (spec.mode == "mask" and ratio < 1 / spec.cap))
            stays = m and not (spec.mode == "mask" and outside)
            w_row.append((min(ratio, spec.cap) if spec.mode == "truncate" else ratio) if stays else 0.0)
            k_row.append(stays)
            c_row.append(outside)
        weights.append(w_row)
        keep.append(k_row)
        corrected.append(c_row)
    return torch.tensor(weights), torch.tensor(keep), torch.tensor(corrected)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_weights_equal_the_formulas(spec, seed):
    old, behaviour, mask = drawn(seed)
    weights, keep = importance_weights(old.requires_grad_(), behaviour, mask, spec)
    expected, stays, corrected = transcription(old, behaviour, mask, spec)
    assert not weights.requires_grad
    assert torch.equal(keep, stays)
    torch.testing.assert_close(weights, expected, rtol=2e-6, atol=1e-7)
    assert corrected.any(), "the draw must exercise the correction"
    metric_weight = mask / mask.sum()
    fraction = corrected_fraction(old, behaviour, mask, metric_weight, spec)
    assert fraction.item() == pytest.approx((corrected.sum() / mask.sum()).item(), rel=1e-6)


def test_off_changes_nothing():
    old, behaviour, mask = drawn(0)
    weights, keep = importance_weights(old, behaviour, mask, ImportanceSpec(level="off"))
    assert torch.equal(weights, mask.float())
    assert torch.equal(keep, mask)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_masked_garbage_and_extreme_differences_stay_finite(spec):
    old, behaviour, mask = drawn(1)
    clean = importance_weights(old, behaviour, mask, spec)
    metric_weight = mask / mask.sum()
    measured = mismatch_metrics(old, behaviour, mask, metric_weight)
    old[~mask] = math.nan
    behaviour[~mask] = -math.inf
    metric_weight[~mask] = math.nan
    spoilt = importance_weights(old, behaviour, mask, spec)
    assert all(torch.equal(a, b) for a, b in zip(clean, spoilt, strict=True))
    assert mismatch_metrics(old, behaviour, mask, metric_weight) == measured
    far = importance_weights(old * 0 - 1000.0, behaviour * 0, mask, spec)
    assert torch.isfinite(far[0]).all()


def test_metrics_equal_their_definitions():
    old, behaviour, mask = drawn(2)
    sums, maxima = mismatch_metrics(old, behaviour, mask, mask / mask.sum())
    d = (old - behaviour)[mask].double()
    expected = {
        "mismatch/kl": (-d).mean(),
        "mismatch/k3": (d.exp() - 1 - d).mean(),
        "mismatch/ratio": d.exp().mean(),
        "mismatch/log_prob_diff": d.abs().mean(),
    }
    assert set(sums) == set(expected)
    for name, value in expected.items():
        assert sums[name].item() == pytest.approx(value.item(), rel=1e-5), name
    assert set(maxima) == {"mismatch/log_prob_diff_max"}
    assert maxima["mismatch/log_prob_diff_max"].item() == pytest.approx(d.abs().max().item())


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0), (2, 3)])
def test_nothing_to_measure_is_zero(shape):
    zero = torch.zeros(shape)
    sums, maxima = mismatch_metrics(zero, zero, torch.zeros(shape, dtype=torch.bool), zero)
    assert all(value.item() == 0 for value in (*sums.values(), *maxima.values()))


def test_ratio_and_k3_are_unbiased_under_the_behaviour():
    old = torch.log_softmax(torch.tensor([0.3, -1.0, 2.0, 0.0]), dim=0)[None]
    behaviour = torch.log_softmax(torch.tensor([0.0, 0.5, 1.0, -0.2]), dim=0)[None]
    mask = torch.ones(1, 4, dtype=torch.bool)
    sums, _ = mismatch_metrics(old, behaviour, mask, behaviour.exp())
    divergence = (behaviour.exp() * (behaviour - old)).sum().item()
    assert sums["mismatch/ratio"].item() == pytest.approx(1.0, rel=1e-5)
    assert sums["mismatch/k3"].item() == pytest.approx(divergence, rel=1e-4)
    assert sums["mismatch/kl"].item() == pytest.approx(divergence, rel=1e-4)
