"""mmrl's formulas against the functions that verl registers under the same names, on random ragged batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from verl.trainer.ppo import core_algos
from verl.workers.config import FSDPActorConfig

from mmrl_core.contracts import ActionStats, LossBatch
from mmrl_core.grpo.advantages import compute_advantages
from mmrl_core.grpo.aggregation import action_weights
from mmrl_core.grpo.kl import kl_estimate
from mmrl_core.grpo.losses import build_loss
from mmrl_core.recipe import AdvantageSpec, AlgorithmSpec, LossSpec

CLOSE = 1e-6
SEEDS = range(4)


@dataclass(frozen=True, kw_only=True)
class Ragged:
    """Rows [b, t] of groups of 2 to 5 samples."""

    rewards: Tensor
    groups: Tensor
    mask: Tensor
    old: Tensor
    now: Tensor
    advantages: Tensor

    @classmethod
    def draw(cls, seed: int) -> Ragged:
        draw = torch.Generator().manual_seed(seed)
        sizes = torch.randint(2, 6, (5,), generator=draw)
        groups = torch.repeat_interleave(torch.arange(5), sizes)
        rows, width = len(groups), 11
        mask = torch.arange(width) < torch.randint(1, width + 1, (rows, 1), generator=draw)
        old = -3.0 + torch.randn(rows, width, generator=draw)
        return cls(
            # some groups of equal rewards, as rules give them
            rewards=torch.randint(0, 3, (rows,), generator=draw).double() / 2,
            groups=groups,
            mask=mask,
            old=old,
            now=old + 0.4 * torch.randn(rows, width, generator=draw),
            advantages=torch.randn(rows, generator=draw),
        )


def of_verl(name: str, batch: Ragged, **settings: Any) -> Tensor:
    """[N]: verl's estimator on rewards at the last token, at each sample's first token."""
    by_token = torch.zeros(batch.mask.shape, dtype=torch.float64)
    by_token[torch.arange(len(by_token)), batch.mask.sum(-1) - 1] = batch.rewards
    function = core_algos.get_adv_estimator_fn(name)
    index = np.array([f"prompt {g}" for g in batch.groups.tolist()], dtype=object)
    found, _ = function(token_level_rewards=by_token, response_mask=batch.mask.double(), index=index, **settings)
    return found[:, 0].double()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("ours", "theirs", "settings"),
    [
        ("grpo", "grpo", {}),
        ("dr_grpo", "grpo", {"norm_adv_by_std_in_grpo": False}),
        ("dr_grpo", "grpo_vectorized", {"norm_adv_by_std_in_grpo": False}),
        ("rloo", "rloo", {}),
        ("rloo", "rloo_vectorized", {}),
    ],
)
def test_advantages(ours: str, theirs: str, settings: dict[str, Any], seed: int) -> None:
    batch = Ragged.draw(seed)
    valid = torch.ones(len(batch.rewards), dtype=torch.bool)
    spec = AdvantageSpec.model_validate({"name": ours, "eps": 1e-6})
    found = compute_advantages(batch.rewards, batch.groups, valid, spec).double()
    torch.testing.assert_close(found, of_verl(theirs, batch, **settings), rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize(
    ("ours", "theirs"), [("k1", "kl"), ("k1", "k1"), ("k2", "mse"), ("abs", "abs"), ("k3", "k3"), ("k3", "low_var_kl")]
)
def test_kl_estimators(ours: Any, theirs: str) -> None:
    """Value and gradient. verl cuts k3 at 10; mmrl does not, so differences stay below that here."""
    batch = Ragged.draw(0)
    leaf, other = batch.now.double().requires_grad_(), batch.now.double().requires_grad_()
    found = kl_estimate(leaf, batch.old, ours)
    expected = core_algos.kl_penalty(other.float(), batch.old, theirs)
    torch.testing.assert_close(found, expected, rtol=CLOSE, atol=CLOSE)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=CLOSE, atol=CLOSE)


def test_k3_differs_where_verl_cuts_it() -> None:
    """Far from the reference, as the documentation says."""
    far, reference = torch.tensor([-8.0]), torch.tensor([-2.0])
    assert float(core_algos.kl_penalty(far, reference, "k3")) == 10.0
    assert float(kl_estimate(far, reference, "k3")) == pytest.approx(np.exp(6.0) - 7.0, rel=1e-6)


def our_loss(batch: Ragged, spec: LossSpec, max_actions: int) -> tuple[float, Tensor, float]:
    """(loss, dL/dlogp, clip fraction) of the core's loss over all rows."""
    algorithm = AlgorithmSpec(steps=1, prompts_per_step=1, samples_per_prompt=2, loss=spec)
    actions, rows = int(batch.mask.sum()), len(batch.mask)
    weight = action_weights(
        batch.mask, spec.aggregation, global_actions=actions, global_sequences=rows, max_actions=max_actions
    )
    leaf = batch.now.clone().requires_grad_()
    output = build_loss(algorithm)(
        ActionStats(log_probs=leaf),
        LossBatch(
            advantages=batch.advantages,
            mask=batch.mask,
            weight=weight,
            metric_weight=batch.mask / actions,
            behaviour_log_probs=batch.old,
            old_log_probs=batch.old,
        ),
    )
    (gradient,) = torch.autograd.grad(output.loss, leaf)
    return float(output.loss.detach()), gradient, float(output.sums["actor/pg_clipfrac"])


def loss_of_verl(name: str, batch: Ragged, mode: str, **settings: Any) -> tuple[float, Tensor, float]:
    config = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=2,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=0.2,
        clip_ratio_high=0.28,
        global_batch_info={"loss_scale_factor": batch.mask.shape[1]},
        **settings,
    )
    leaf = batch.now.clone().requires_grad_()
    loss, metrics = core_algos.get_policy_loss_fn(name)(
        old_log_prob=batch.old,
        log_prob=leaf,
        advantages=batch.advantages[:, None].expand(batch.mask.shape),
        response_mask=batch.mask.float(),
        loss_agg_mode=mode,
        config=config,
    )
    (gradient,) = torch.autograd.grad(loss, leaf)
    return float(loss.detach()), gradient, metrics["actor/pg_clipfrac"]


MODES = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("theirs", "ours", "settings"),
    [
        ("vanilla", {"name": "ppo_clip", "dual_clip": 1.1}, {"clip_ratio_c": 1.1}),
        ("vanilla", {"name": "ppo_clip"}, {"clip_ratio_c": 1e9}),
        ("gspo", {"name": "gspo"}, {}),
    ],
)
def test_losses(theirs: str, ours: dict[str, Any], settings: dict[str, Any], mode: Any) -> None:
    """Value, gradient and clip fraction, in every aggregation that both have."""
    for seed in SEEDS:
        batch = Ragged.draw(seed)
        spec = LossSpec.model_validate({**ours, "clip_low": 0.2, "clip_high": 0.28, "aggregation": mode})
        loss, gradient, clipped = our_loss(batch, spec, batch.mask.shape[1])
        expected, expected_gradient, expected_clipped = loss_of_verl(theirs, batch, mode, **settings)
        assert loss == pytest.approx(expected, rel=CLOSE, abs=CLOSE)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=CLOSE)
        assert clipped == pytest.approx(expected_clipped, abs=CLOSE)


def test_mmrls_functions_in_verls_registries() -> None:
    """`pip install mmrl-verl` is enough: importing verl registered them."""
    batch = Ragged.draw(1)
    for word, eps in (("grpo", 1e-6), ("dr_grpo", 0.0), ("rloo", 0.0), ("global_std", 1e-6)):
        valid = torch.ones(len(batch.rewards), dtype=torch.bool)
        spec = AdvantageSpec.model_validate({"name": word, **({"eps": eps} if eps else {})})
        expected = compute_advantages(batch.rewards, batch.groups, valid, spec).double()
        torch.testing.assert_close(of_verl(f"mmrl_{word}", batch, config=None), expected)
    for word, theirs in (("ppo_clip", "vanilla"), ("gspo", "gspo")):
        found = loss_of_verl(f"mmrl_{word}", batch, "token-mean", clip_ratio_c=1.1)
        expected_loss = loss_of_verl(theirs, batch, "token-mean", clip_ratio_c=1.1)
        assert found[0] == pytest.approx(expected_loss[0], rel=CLOSE)
        torch.testing.assert_close(found[1], expected_loss[1], rtol=1e-5, atol=CLOSE)
        assert found[2] == pytest.approx(expected_loss[2], abs=CLOSE)
