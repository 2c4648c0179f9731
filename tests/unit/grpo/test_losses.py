"""The policy loss against transcriptions of the papers: values and gradients, one action at a time, in float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from mmrl_core.contracts import ActionStats, LossBatch
from mmrl_core.grpo.aggregation import action_weights
from mmrl_core.grpo.losses import build_loss
from mmrl_core.recipe import AlgorithmSpec, ImportanceSpec, KlSpec, LossSpec

MODES = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
IMPORTANCE = [
    ImportanceSpec(),
    *(
        ImportanceSpec(level=level, mode=mode, cap=1.5)
        for level, mode in itertools.product(("token", "sequence"), ("truncate", "mask"))
    ),
]


def algorithm(loss=None, kl=None, importance=None):
    return AlgorithmSpec(
        steps=1,
        prompts_per_step=1,
        samples_per_prompt=2,
        loss=loss or LossSpec(),
        kl=kl or KlSpec(),
        importance=importance or ImportanceSpec(),
    )


def drawn(seed, *, rows=8, width=6, spread=0.4, mode="token-mean", old=True, reference=True, entropy=True):
    generator = torch.Generator().manual_seed(seed)

    def noise():
        return torch.randn(rows, width, generator=generator)

    log_probs = -torch.rand(rows, width, generator=generator) * 4
    previous = log_probs + spread * noise()
    behaviour = previous + 0.15 * noise()
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    lengths[0] = 0
    mask = torch.arange(width)[None] < lengths[:, None]
    actions, sequences = int(mask.sum()), int(mask.any(1).sum())
    batch = LossBatch(
        advantages=torch.randn(rows, generator=generator),
        mask=mask,
        weight=action_weights(mask, mode, global_actions=actions, global_sequences=sequences, max_actions=9),
        metric_weight=mask.float() / actions,
        behaviour_log_probs=behaviour,
        old_log_probs=previous if old else None,
        reference_log_probs=log_probs + 0.3 * noise() if reference else None,
    )
    stats = ActionStats(
        log_probs=log_probs.requires_grad_(),
        entropy=(noise().abs()).requires_grad_() if entropy else None,
    )
    return stats, batch


def take(stats, batch, index):
    """Some rows (an index or slice), or a tuple (rows, actions)."""
    rows = index[0] if isinstance(index, tuple) else index

    def cut(x):
        return None if x is None else x[index]

    return (
        ActionStats(log_probs=cut(stats.log_probs), entropy=cut(stats.entropy), kl=cut(stats.kl)),
        LossBatch(
            advantages=batch.advantages[rows],
            **{
                name: cut(getattr(batch, name))
                for name in (
                    "mask",
                    "weight",
                    "metric_weight",
                    "behaviour_log_probs",
                    "old_log_probs",
                    "reference_log_probs",
                )
            },
        ),
    )


def gradients(loss, stats):
    inputs = [x for x in (stats.log_probs, stats.entropy, stats.kl) if x is not None and x.requires_grad]
    return torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)


# ------------------------------------------------------------------------------------------------ transcriptions


def clipped_surrogate(ratio, advantage, spec):
    """(value, slope with respect to the log of the ratio, clipped?, dual clipped?) of one action, case by case."""
    low = 1 - spec.clip_low
    high = 1 + (spec.clip_low if spec.clip_high is None else spec.clip_high)
    if advantage >= 0:
        if ratio > high:
            return -advantage * high, 0.0, advantage > 0, False
        return -advantage * ratio, -advantage * ratio, False, False
    if ratio < low:
        return -advantage * low, 0.0, True, False
    if spec.dual_clip is not None and ratio > spec.dual_clip:
        return -advantage * spec.dual_clip, 0.0, False, True
    return -advantage * ratio, -advantage * ratio, False, False


def transcription(stats, batch, recipe):
    """(loss, dLoss/dlog_probs, metrics) in plain Python."""
    spec, importance, kl = recipe.loss, recipe.importance, recipe.kl
    lp = stats.log_probs.tolist()
    old = lp if batch.old_log_probs is None else batch.old_log_probs.tolist()
    mask, weight, metric_weight = batch.mask.tolist(), batch.weight.tolist(), batch.metric_weight.tolist()
    behaviour = batch.behaviour_log_probs.tolist()
    entropy = None if stats.entropy is None else stats.entropy.tolist()
    slope = [[0.0] * len(row) for row in lp]
    names = ("actor/pg_loss", "actor/kl_loss", "actor/pg_clipfrac", "actor/pg_clipfrac_lower", "actor/ppo_kl")
    sums = dict.fromkeys((*names, "actor/entropy", "bonus"), 0.0)
    for i, row in enumerate(mask):
        steps = [t for t, m in enumerate(row) if m]
        if not steps:
            continue
        mean_log_ratio = sum(lp[i][t] - old[i][t] for t in steps) / len(steps)
        row_mismatch = sum(old[i][t] - behaviour[i][t] for t in steps)
        for t in steps:
            log_ratio = mean_log_ratio if spec.name == "gspo" else lp[i][t] - old[i][t]
            value, gradient, clip, dual = clipped_surrogate(math.exp(log_ratio), float(batch.advantages[i]), spec)
            w, mw = weight[i][t], metric_weight[i][t]
            factor = 1.0
            if importance.level != "off":
                factor = math.exp(row_mismatch if importance.level == "sequence" else old[i][t] - behaviour[i][t])
                if importance.mode == "truncate":
                    factor = min(factor, importance.cap)
                elif not 1 / importance.cap <= factor <= importance.cap:
                    factor = w = 0.0
            sums["actor/pg_loss"] += w * factor * value
            slope[i][t] += w * factor * gradient
            sums["actor/pg_clipfrac"] += mw * clip
            sums["actor/pg_clipfrac_lower"] += mw * dual
            sums["actor/ppo_kl"] += mw * (old[i][t] - lp[i][t])
            if batch.reference_log_probs is not None:
                d = lp[i][t] - float(batch.reference_log_probs[i, t])
                divergence, pull = {
                    "k1": (d, 1.0),
                    "k2": (d * d / 2, d),
                    "k3": (math.expm1(-d) + d, -math.expm1(-d)),
                    "abs": (abs(d), math.copysign(1, d)),
                }[kl.estimator]
                sums["actor/kl_loss"] += w * divergence
                slope[i][t] += kl.coef * w * pull
            if entropy is not None:
                sums["actor/entropy"] += mw * entropy[i][t]
                sums["bonus"] += w * entropy[i][t]
    loss = sums["actor/pg_loss"] + kl.coef * sums["actor/kl_loss"] - spec.entropy_coef * sums.pop("bonus")
    return loss, torch.tensor(slope), sums


def check(stats, batch, recipe):
    output = build_loss(recipe)(stats, batch)
    loss, slope, sums = transcription(stats, batch, recipe)
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(loss, rel=1e-4, abs=2e-6)
    torch.testing.assert_close(gradients(output.loss, stats)[0], slope, rtol=1e-4, atol=1e-6)
    for name, value in sums.items():
        if name == "actor/pg_clipfrac_lower" and recipe.loss.dual_clip is None:
            assert name not in output.sums
        else:
            assert output.sums[name].item() == pytest.approx(value, rel=1e-4, abs=2e-6), name
            assert not output.sums[name].requires_grad
    return output, sums


# ------------------------------------------------------------------------------------------------ values and gradients


@pytest.mark.parametrize("importance", IMPORTANCE, ids=lambda s: f"{s.level}-{s.mode}")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["ppo_clip", "gspo"])
def test_loss_gradient_and_metrics_equal_the_formulas(name, mode, importance):
    for seed, estimator in enumerate(("k1", "k2", "k3", "abs")):
        recipe = algorithm(
            LossSpec(name=name, clip_low=0.2, clip_high=0.3, dual_clip=1.4, aggregation=mode, entropy_coef=0.05),
            KlSpec(coef=0.1, estimator=estimator),
            importance,
        )
        output, _ = check(*drawn(seed, mode=mode), recipe)
        assert ("mismatch/corrected_fraction" in output.sums) == (importance.level != "off")


@pytest.mark.parametrize("dual_clip", [None, 1.4])
@pytest.mark.parametrize("clip_high", [None, 0.28])
def test_every_branch_of_the_clip_is_met(dual_clip, clip_high):
    recipe = algorithm(LossSpec(clip_low=0.2, clip_high=clip_high, dual_clip=dual_clip))
    _, sums = check(*drawn(5, rows=64, spread=0.6), recipe)
    assert 0 < sums["actor/pg_clipfrac"] < 1
    assert (sums["actor/pg_clipfrac_lower"] > 0) == (dual_clip is not None)


@pytest.mark.parametrize(
    ("advantage", "ratio", "value", "moves"),
    [
        (1.0, 1.1, -1.1, True),
        (1.0, 1.5, -1.3, False),
        (1.0, 0.5, -0.5, True),
        (-1.0, 0.9, 0.9, True),
        (-1.0, 0.5, 0.8, False),
        (-1.0, 2.5, 2.5, True),
        (-1.0, 4.0, 3.0, False),
        (1.0, 4.0, -1.3, False),
        (0.0, 9.0, 0.0, False),
    ],
)
def test_branch_by_branch(advantage, ratio, value, moves):
    recipe = algorithm(LossSpec(clip_low=0.2, clip_high=0.3, dual_clip=3.0))
    one = torch.ones(1, 1)
    log_probs = torch.full((1, 1), math.log(ratio), requires_grad=True)
    batch = LossBatch(
        advantages=torch.tensor([advantage]),
        mask=one.bool(),
        weight=one,
        metric_weight=one,
        behaviour_log_probs=one * 0,
        old_log_probs=one * 0,
    )
    output = build_loss(recipe)(ActionStats(log_probs=log_probs), batch)
    (slope,) = torch.autograd.grad(output.loss, log_probs)
    assert output.loss.item() == pytest.approx(value, rel=1e-6)
    assert slope.item() == pytest.approx(-advantage * ratio if moves else 0.0, rel=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(3))
def test_gspo_gradient_is_that_of_the_sequence_objective(mode, seed):
    # The paper's objective with s fully differentiable, in float64; for other aggregations the row's term gets the
    # row's total weight. Ours lets gradient flow through single actions instead, and must come to the same.
    spec = LossSpec(name="gspo", clip_low=0.05, clip_high=0.08, aggregation=mode)
    stats, batch = drawn(seed, rows=24, spread=0.15, mode=mode, reference=False)
    exact = stats.log_probs.detach().double().requires_grad_()
    objective = torch.zeros((), dtype=torch.float64)
    rows = [i for i in range(24) if batch.mask[i].any()]
    for i in rows:
        m = batch.mask[i]
        s = (exact[i, m] - batch.old_log_probs[i, m].double()).mean().exp()
        a = batch.advantages[i].double()
        term = torch.minimum(s * a, s.clamp(0.95, 1.08) * a)
        scale = 1 / len(rows) if mode == "seq-mean-token-mean" else batch.weight[i].double().sum()
        objective = objective + scale * term
    (expected,) = torch.autograd.grad(-objective, exact)
    output = build_loss(algorithm(spec))(stats, batch)
    assert output.loss.item() == pytest.approx(-objective.item(), rel=1e-5)
    torch.testing.assert_close(gradients(output.loss, stats)[0].double(), expected, rtol=1e-4, atol=1e-8)
    assert 0 < output.sums["actor/pg_clipfrac"].item() < 1


@pytest.mark.parametrize("name", ["ppo_clip", "gspo"])
@pytest.mark.parametrize("clip", [0.2, 0.0])
def test_one_update_per_rollout_has_ratio_exactly_one(name, clip):
    stats, batch = drawn(0, old=False, reference=False)
    recipe = algorithm(LossSpec(name=name, clip_low=clip))
    output = build_loss(recipe)(stats, batch)
    advantages = batch.advantages[:, None] * batch.weight
    assert output.loss.item() == (-advantages).sum().item()
    assert torch.equal(gradients(output.loss, stats)[0], -advantages)
    assert output.sums["actor/ppo_kl"].item() == 0.0
    assert output.sums["actor/pg_clipfrac"].item() == 0.0
    explicit = replace(batch, old_log_probs=stats.log_probs.detach().clone())
    again = build_loss(recipe)(stats, explicit)
    assert torch.equal(again.loss, output.loss)
    assert torch.equal(gradients(again.loss, stats)[0], -advantages)
    assert again.sums == output.sums


# ------------------------------------------------------------------------------------------------ the policy's factor


@pytest.mark.parametrize("name", ["ppo_clip", "gspo"])
@pytest.mark.parametrize("dual_clip", [None, 1.4])
def test_a_factor_of_two_is_twice_the_advantage(name, dual_clip):
    # No KL and no entropy here: the factor is on the policy-gradient term.
    recipe = algorithm(LossSpec(name=name, clip_high=0.3, dual_clip=dual_clip), importance=IMPORTANCE[1])
    stats, batch = drawn(2, rows=32, reference=False)
    doubled = build_loss(recipe)(stats, replace(batch, advantages=2 * batch.advantages))
    weighted = build_loss(recipe)(replace(stats, weight=torch.full(batch.mask.shape, 2.0)), batch)
    torch.testing.assert_close(weighted.loss, doubled.loss)
    for got, expected in zip(gradients(weighted.loss, stats), gradients(doubled.loss, stats), strict=True):
        torch.testing.assert_close(got, expected)
    assert weighted.sums.keys() == doubled.sums.keys()
    for key in weighted.sums:
        torch.testing.assert_close(weighted.sums[key], doubled.sums[key])


def test_factors_touch_the_policy_gradient_only():
    recipe = algorithm(LossSpec(entropy_coef=0.05), KlSpec(coef=0.1))
    stats, batch = drawn(3)
    loss = build_loss(recipe)
    plain, ones = loss(stats, batch), loss(replace(stats, weight=torch.ones(batch.mask.shape)), batch)
    assert torch.equal(ones.loss, plain.loss)
    # a different factor for every action, against the sum of single actions
    factors = torch.rand(batch.mask.shape, generator=torch.Generator().manual_seed(0)) * 3
    output = loss(replace(stats, weight=factors), batch)
    only = build_loss(algorithm(LossSpec()))
    single = [
        (i, t, only(*take(stats, batch, (slice(i, i + 1), slice(t, t + 1)))).loss.item())
        for i, t in batch.mask.nonzero().tolist()
    ]
    want = plain.loss.item() + sum((factors[i, t].item() - 1) * value for i, t, value in single)
    assert output.loss.item() == pytest.approx(want, rel=1e-5)
    assert output.sums["actor/pg_loss"].item() == pytest.approx(
        sum(factors[i, t].item() * value for i, t, value in single), rel=1e-5
    )
    for name in plain.sums:
        if name != "actor/pg_loss":
            assert torch.equal(output.sums[name], plain.sums[name]), name
    entropy = [gradients(x.loss, stats)[1] for x in (output, plain)]
    assert torch.equal(*entropy)


def test_garbage_factors_outside_the_mask_and_gradients_into_factors_do_nothing():
    stats, batch = drawn(4)
    loss = build_loss(algorithm())
    factors = torch.full(batch.mask.shape, 0.5).masked_fill(~batch.mask, math.nan).requires_grad_()
    output = loss(replace(stats, weight=factors), batch)
    clean = loss(replace(stats, weight=torch.full(batch.mask.shape, 0.5)), batch)
    assert torch.equal(output.loss, clean.loss)
    (into,) = torch.autograd.grad(output.loss, [factors], retain_graph=True, allow_unused=True)
    assert into is None
    assert torch.equal(gradients(output.loss, stats)[0], gradients(clean.loss, stats)[0])


# ------------------------------------------------------------------------------------------------ invariances

RECIPES = [
    algorithm(LossSpec(name=name, dual_clip=2.0, entropy_coef=0.01), KlSpec(coef=0.2), importance)
    for name in ("ppo_clip", "gspo")
    for importance in (IMPORTANCE[0], IMPORTANCE[1], IMPORTANCE[4])
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.loss.name}-{r.importance.level}")
@pytest.mark.parametrize("seed", range(3))
def test_splitting_rows_and_actions_changes_nothing(recipe, seed):
    stats, batch = drawn(seed)
    loss = build_loss(recipe)
    whole = loss(stats, batch)
    cuts = [
        [slice(0, 3), slice(3, 3), slice(3, 4), slice(4, 8)],
        [[0, 2, 4, 6], [1, 3, 5, 7]],
    ]
    if loss.scope == "action":
        cuts.append([(slice(None), slice(t, t + 2)) for t in (0, 2, 4)])
    for cut in cuts:
        parts = [loss(*take(stats, batch, index)) for index in cut]
        total = sum(part.loss for part in parts)
        assert total.item() == pytest.approx(whole.loss.item(), rel=1e-5, abs=1e-6)
        for got, expected in zip(gradients(total, stats), gradients(whole.loss, stats), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
        assert all(part.sums.keys() == whole.sums.keys() for part in parts)
        for name, value in whole.sums.items():
            summed = sum(part.sums[name].item() for part in parts)
            assert summed == pytest.approx(value.item(), rel=1e-5, abs=1e-6), name
        for name, value in whole.maxima.items():
            assert max(part.maxima[name].item() for part in parts) == value.item(), name


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.loss.name}-{r.importance.level}")
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_masked_garbage_has_no_effect(recipe, garbage):
    stats, batch = drawn(1)
    clean = build_loss(recipe)(stats, batch)
    expected = gradients(clean.loss, stats)
    hole = ~batch.mask

    def spoil(x):
        return x.detach().masked_fill(hole, garbage)

    spoilt_stats = ActionStats(
        log_probs=spoil(stats.log_probs).requires_grad_(), entropy=spoil(stats.entropy).requires_grad_()
    )
    spoilt = replace(
        batch,
        advantages=torch.where(batch.mask.any(1), batch.advantages, garbage),
        weight=spoil(batch.weight),
        metric_weight=spoil(batch.metric_weight),
        behaviour_log_probs=spoil(batch.behaviour_log_probs),
        old_log_probs=spoil(batch.old_log_probs),
        reference_log_probs=spoil(batch.reference_log_probs),
    )
    got = build_loss(recipe)(spoilt_stats, spoilt)
    assert torch.equal(got.loss, clean.loss)
    assert got.sums == clean.sums
    assert got.maxima == clean.maxima
    assert all(torch.equal(a, b) for a, b in zip(gradients(got.loss, spoilt_stats), expected, strict=True))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.loss.name}-{r.importance.level}")
@pytest.mark.parametrize("gap", [-300.0, 300.0])
def test_far_apart_log_probs_stay_finite(recipe, gap):
    stats, batch = drawn(2)
    far = replace(
        batch,
        old_log_probs=stats.log_probs.detach() + gap,
        behaviour_log_probs=stats.log_probs.detach() - gap,
        reference_log_probs=stats.log_probs.detach() + gap,
    )
    output = build_loss(recipe)(stats, far)
    assert torch.isfinite(output.loss)
    assert all(torch.isfinite(g).all() for g in gradients(output.loss, stats))
    assert all(math.isfinite(v.item()) for v in (*output.sums.values(), *output.maxima.values()))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.loss.name}-{r.importance.level}")
def test_an_empty_share_is_a_zero_with_a_gradient(recipe):
    stats, batch = drawn(3)
    empty_stats, empty = take(stats, batch, slice(0, 0))
    output = build_loss(recipe)(empty_stats, empty)
    assert output.loss.item() == 0.0
    assert output.loss.requires_grad
    assert all(v.item() == 0.0 for v in (*output.sums.values(), *output.maxima.values()))
    assert all((g == 0).all() for g in gradients(output.loss, stats))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.loss.name}-{r.importance.level}")
def test_nothing_waits_for_the_device(recipe):
    # Tensors without data: reading any value back to the host raises.
    stats, batch = drawn(4)

    def away(x):
        return None if x is None else x.detach().to("meta")

    with pytest.raises(RuntimeError):
        bool(away(batch.mask).any())
    output = build_loss(recipe)(
        ActionStats(log_probs=away(stats.log_probs).requires_grad_(), entropy=away(stats.entropy)),
        LossBatch(**{name: away(value) for name, value in vars(batch).items()}),
    )
    output.loss.backward()
    assert output.loss.shape == ()
    assert all(value.shape == () for value in (*output.sums.values(), *output.maxima.values()))


def test_lower_precision_inputs_are_computed_in_fp32():
    stats, batch = drawn(6)
    recipe = RECIPES[0]
    rounded = ActionStats(log_probs=stats.log_probs.detach().bfloat16(), entropy=stats.entropy.detach().bfloat16())
    widened = ActionStats(log_probs=rounded.log_probs.float(), entropy=rounded.entropy.float())
    assert torch.equal(build_loss(recipe)(rounded, batch).loss, build_loss(recipe)(widened, batch).loss)


# ------------------------------------------------------------------------------------------------ what recipes ask for


@pytest.mark.parametrize("name", ["ppo_clip", "gspo"])
@pytest.mark.parametrize("level", ["off", "token", "sequence"])
def test_scope_says_whether_whole_rows_are_needed(name, level):
    loss = build_loss(algorithm(LossSpec(name=name), importance=ImportanceSpec(level=level)))
    assert loss.scope == ("sequence" if "gspo" in name or level == "sequence" else "action")


def test_entropy_carries_gradient_only_with_a_bonus():
    stats, batch = drawn(0)
    without = build_loss(algorithm())
    assert without.entropy_gradient is False
    assert (gradients(without(stats, batch).loss, stats)[1] == 0).all()
    for coef in (0.3, -0.3):
        bonus = build_loss(algorithm(LossSpec(entropy_coef=coef)))
        assert bonus.entropy_gradient is True
        torch.testing.assert_close(gradients(bonus(stats, batch).loss, stats)[1], -coef * batch.weight)
    with pytest.raises(AssertionError, match="entropy"):
        build_loss(algorithm(LossSpec(entropy_coef=0.1)))(ActionStats(log_probs=stats.log_probs), batch)
    assert "actor/entropy" not in without(ActionStats(log_probs=stats.log_probs), batch).sums


@pytest.mark.parametrize("kl", [KlSpec(coef=0.0), KlSpec(coef=0.7, where="reward")])
def test_divergence_outside_the_loss_is_measured_only(kl):
    stats, batch = drawn(0)
    plain = build_loss(algorithm())(stats, replace(batch, reference_log_probs=None))
    measured = build_loss(algorithm(kl=kl))(stats, batch)
    assert torch.equal(measured.loss, plain.loss)
    assert torch.equal(gradients(measured.loss, stats)[0], gradients(plain.loss, stats)[0])
    assert measured.sums["actor/kl_loss"].item() > 0
    assert "actor/kl_loss" not in plain.sums


def test_the_policy_s_own_divergence_comes_first():
    stats, batch = drawn(0)
    own = torch.rand(batch.mask.shape).requires_grad_()
    loss = build_loss(algorithm(kl=KlSpec(coef=0.5)))
    output = loss(replace(stats, kl=own), batch)
    assert output.sums["actor/kl_loss"].item() == pytest.approx((batch.weight * own).sum().item())
    torch.testing.assert_close(torch.autograd.grad(output.loss, own)[0], 0.5 * batch.weight)
    with pytest.raises(AssertionError, match="reference"):
        loss(stats, replace(batch, reference_log_probs=None))


def test_actions_left_out_by_the_correction_leave_every_term():
    stats, batch = drawn(0)
    shifted = batch.behaviour_log_probs.clone()
    shifted[1] = batch.old_log_probs[1] - 5.0
    batch = replace(batch, behaviour_log_probs=shifted)
    recipe = algorithm(
        LossSpec(entropy_coef=0.1), KlSpec(coef=0.2), ImportanceSpec(level="token", mode="mask", cap=1.1)
    )
    output = build_loss(recipe)(stats, batch)
    assert output.sums["mismatch/corrected_fraction"].item() > 0
    assert all((gradient[1] == 0).all() for gradient in gradients(output.loss, stats))
    assert any((gradient[2] != 0).any() for gradient in gradients(output.loss, stats))
