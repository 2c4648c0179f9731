"""Aggregation weights against the written-out means, whole and split."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmrl_core.grpo.aggregation import action_weights

MODES = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
LIMIT = 16


def aggregate(values, mask, mode):
    rows = [v[m] for v, m in zip(values, mask, strict=True) if m.any()]
    if mode == "token-mean":
        return np.concatenate(rows).mean()
    if mode == "seq-mean-token-mean":
        return np.mean([row.mean() for row in rows])
    scale = LIMIT if mode == "seq-mean-token-sum-norm" else 1
    return np.mean([row.sum() for row in rows]) / scale


def ragged(seed, rows=9, width=11):
    draw = np.random.default_rng(seed)
    lengths = draw.integers(0, width + 1, rows)
    lengths[:2] = (0, width)
    mask = np.arange(width)[None] < lengths[:, None]
    mask[3] &= draw.random(width) < 0.5  # not a prefix: trained denoising steps may be any
    return draw.normal(size=(rows, width)), mask


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(5))
def test_weighted_sum_is_the_aggregation_whole_and_split(mode, seed):
    values, mask = ragged(seed)
    counts = {
        "global_actions": int(mask.sum()),
        "global_sequences": int(mask.any(1).sum()),
        "max_actions": LIMIT,
    }
    weight = action_weights(torch.tensor(mask), mode, **counts)
    assert weight.dtype == torch.float32
    assert (weight[~torch.tensor(mask)] == 0).all()
    total = (weight.double().numpy() * values).sum()
    assert total == pytest.approx(aggregate(values, mask, mode), rel=1e-6, abs=1e-7)
    parts = [
        action_weights(torch.tensor(mask[rows]), mode, **counts) for rows in (slice(0, 4), slice(4, 4), slice(4, 9))
    ]
    assert torch.equal(torch.cat(parts), weight)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_to_count_is_zero_not_nan(mode):
    for rows in (0, 2):
        weight = action_weights(
            torch.zeros(rows, 3, dtype=torch.bool), mode, global_actions=0, global_sequences=0, max_actions=3
        )
        assert weight.shape == (rows, 3)
        assert (weight == 0).all()


def test_the_norm_is_the_limit_and_not_the_width_at_hand():
    mask = torch.ones(1, 2, dtype=torch.bool)
    weight = action_weights(mask, "seq-mean-token-sum-norm", global_actions=2, global_sequences=1, max_actions=8)
    assert weight.tolist() == [[0.125, 0.125]]
