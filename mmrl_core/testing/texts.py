"""Rollouts of text without an engine, an independent reference for them, and a loss: what checks are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmrl_core.contracts import ActionStats, Bucket, Loss, LossBatch, LossOutput, Minibatch, Rollouts, TokenPolicy
from mmrl_core.rows import select_rows

Weights = dict[str, Tensor]
"""Full tensors by Hugging Face name."""


def text_rollouts(
    policy: TokenPolicy, group_sizes: Sequence[int] = (3, 2, 4), *, longest: int = 9, seed: int = 0
) -> Rollouts:
    """Random ragged rows in groups of the given sizes, without an engine.

    Prompts have 2 to 12 tokens, responses 1 to `longest`; about half end with the end token, the others count as
    truncated. At least one row is as long as T. `behaviour_log_probs` are plausible random numbers.

    Returns Rollouts with B = sum(group_sizes), T = longest, and without samples.
    """
    draw = torch.Generator().manual_seed(seed)
    ordinary = torch.tensor(sorted(set(range(len(policy.tokenizer))) - set(policy.tokenizer.all_special_ids)))
    ordinary = ordinary[~torch.isin(ordinary, torch.tensor(sorted(policy.eos_ids)))]

    # prompts begin as chat templates make them: with a special token, the padding token among them
    markers = torch.tensor(sorted(set(policy.tokenizer.all_special_ids) - {policy.tokenizer.unk_token_id}))

    def tokens(count: int) -> Tensor:
        return ordinary[torch.randint(len(ordinary), (count,), generator=draw)]

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=draw))

    prompts: list[Tensor] = []
    responses: list[Tensor] = []
    groups: list[int] = []
    for group, size in enumerate(group_sizes):
        prompt = torch.cat([markers[group % len(markers)][None], tokens(number(1, 11))])
        for _ in range(size):
            length = longest if not responses else number(1, longest)
            response = tokens(length)
            if responses and number(0, 1):
                response[-1] = min(policy.eos_ids)
            prompts.append(prompt)
            responses.append(response)
            groups.append(group)
    lengths = torch.tensor([len(r) for r in responses])
    mask = torch.arange(longest) < lengths[:, None]
    ended = torch.tensor([int(r[-1]) in policy.eos_ids for r in responses])
    return Rollouts(
        group_id=torch.tensor(groups),
        sample_id=torch.arange(len(groups)),
        mask=mask,
        behaviour_log_probs=torch.where(mask, -3.0 + torch.randn(mask.shape, generator=draw), 0.0),
        truncated=~ended,
        policy_version=0,
        payload={"prompt_ids": prompts, "response_ids": responses},
    )


# -------------------------------------------------------------------------------------------- the independent reference


def plain_model(folder: str | Path) -> Any:
    """The folder's model as transformers loads it: fp32, on the CPU, eager attention, nothing of mmrl."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, attn_implementation="eager").eval()
    model.get_input_embeddings().padding_idx = None  # its row has a gradient too where the token is not padding
    return model


def plain_logits(model: Any, prompt: Tensor, response: Tensor) -> Tensor:
    """[R, V] logits that predict each response token: one row by itself, no padding, no cache."""
    ids = torch.cat([prompt, response])[None]
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].float()


def plain_stats(model: Any, rollouts: Rollouts, temperature: float = 1.0) -> ActionStats:
    """Log-probs and entropy [B, T] by transformers' own forward, row by row; 0 where not mask. Differentiable."""
    log_probs = torch.zeros(rollouts.mask.shape)
    entropy = torch.zeros(rollouts.mask.shape)
    rows, entropies = list(log_probs), list(entropy)
    for row, (prompt, response) in enumerate(
        zip(rollouts.payload["prompt_ids"], rollouts.payload["response_ids"], strict=True)
    ):
        logs = (plain_logits(model, prompt, response) / temperature).log_softmax(-1)
        filled = (0, rollouts.mask.shape[1] - len(response))
        rows[row] = torch.nn.functional.pad(logs.gather(-1, response[:, None])[:, 0], filled)
        entropies[row] = torch.nn.functional.pad(-(logs.exp() * logs).sum(-1), filled)
    return ActionStats(log_probs=torch.stack(rows), entropy=torch.stack(entropies))


def stored_names(folder: Path) -> list[str]:
    """Names of the tensors in a folder's safetensors files, sorted."""
    from safetensors import safe_open

    names: list[str] = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            names += opened.keys()
    return sorted(names)


# ----------------------------------------------------------------------------------------------- losses and minibatches


class CheckLoss:
    """A small policy-gradient loss for checks: linear in the ratio, with an entropy bonus.

    scope `action`: -sum weight * (A * exp(logp - old) + coefficient * H). scope `sequence`: the ratio of a row is
    exp(mean over its actions of (logp - old)), so that terms of different actions are not independent.
    """

    def __init__(self, scope: Literal["action", "sequence"] = "action", entropy_coefficient: float = 0.1) -> None:
        self.scope = scope
        self.entropy_coefficient = entropy_coefficient
        self.entropy_gradient = entropy_coefficient != 0

    def __call__(self, stats: ActionStats, batch: LossBatch) -> LossOutput:
        """The weighted sum over [b, t]."""
        old = stats.log_probs.detach() if batch.old_log_probs is None else batch.old_log_probs
        difference = (stats.log_probs - old) * batch.mask
        if self.scope == "sequence":
            difference = difference.sum(-1, keepdim=True) / batch.mask.sum(-1, keepdim=True).clamp_min(1)
        ratio = difference.exp()
        terms = ratio * batch.advantages[:, None]
        if self.entropy_gradient:
            assert stats.entropy is not None, "the loss asks for the entropy's gradient, but replay gave no entropy"
            terms = terms + self.entropy_coefficient * stats.entropy
        counted = batch.metric_weight > 0
        largest = torch.where(counted, ratio.detach().expand_as(counted), -torch.inf).amax()
        return LossOutput(
            loss=-(batch.weight * terms).sum(),
            sums={"check/log_prob": (batch.metric_weight * stats.log_probs).sum()},
            maxima={"check/largest_ratio": largest},
        )


def check_minibatch(rollouts: Rollouts, near: Tensor | None = None, *, seed: int = 0) -> Minibatch:
    """All rows with random advantages; weight is mask / (actions in all rows).

    `near` [B, T]: the current log-probs; old log-probs are then random numbers around them, so that ratios are near 1
    but not 1. None: no old log-probs.
    """
    draw = torch.Generator().manual_seed(seed)
    weight = rollouts.mask.float() / rollouts.mask.sum()
    noise = 0.3 * torch.randn(rollouts.mask.shape, generator=draw)
    return Minibatch(
        rollouts=rollouts,
        advantages=torch.randn(len(rollouts), generator=draw),
        weight=weight,
        metric_weight=weight.clone(),
        old_log_probs=None if near is None else torch.where(rollouts.mask, near.detach() + noise, 0.0),
    )


def share(minibatch: Minibatch, groups: Sequence[int]) -> Minibatch:
    """A replica's share: the rows of these groups, or the first row with weight 0 when there are none.

    Weights stay those of the whole minibatch, so shares add up to it.
    """
    wanted = set(groups)
    rows = [row for row, group in enumerate(minibatch.rollouts.group_id.tolist()) if group in wanted]
    factor = 1.0 if rows else 0.0
    rows = rows or [0]
    return Minibatch(
        rollouts=select_rows(minibatch.rollouts, rows),
        advantages=minibatch.advantages[rows] * factor,
        weight=minibatch.weight[rows] * factor,
        metric_weight=minibatch.metric_weight[rows] * factor,
        old_log_probs=None if minibatch.old_log_probs is None else minibatch.old_log_probs[rows],
        reference=None,
    )


def plain_gradients(model: Any, minibatch: Minibatch, loss: Loss, temperature: float = 1.0) -> Weights:
    """Gradients by name of the whole minibatch, by autograd through transformers' own forward."""
    stats = plain_stats(model, minibatch.rollouts, temperature)
    output = loss(
        stats,
        LossBatch(
            advantages=minibatch.advantages,
            mask=minibatch.rollouts.mask,
            weight=minibatch.weight,
            metric_weight=minibatch.metric_weight,
            behaviour_log_probs=minibatch.rollouts.behaviour_log_probs,
            old_log_probs=minibatch.old_log_probs,
        ),
    )
    model.zero_grad()
    output.loss.backward()  # type: ignore[no-untyped-call]
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# -------------------------------------------------------------------------------------------------------------- weights


def collected(weights: Iterator[Bucket]) -> Weights:
    """A whole stream as CPU copies. Asserts that no name comes twice."""
    result: Weights = {}
    for bucket in weights:
        for name, tensor in bucket:
            assert name not in result, f"{name} was streamed twice; tied weights come once"
            result[name] = tensor.detach().cpu().clone()
    return result


def relative_difference(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """||left - right|| / ||right|| over all tensors together, in double precision. Names must be equal."""
    assert sorted(left) == sorted(right), f"names differ: {sorted(set(left) ^ set(right))[:6]}"
    distance = sum(float((left[n].double() - right[n].double()).square().sum()) for n in left)
    size = sum(float(right[n].double().square().sum()) for n in right)
    return float((distance / size) ** 0.5) if size else float(distance**0.5)


def unequal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> list[str]:
    """Names whose tensors are not bit-equal. Names must be equal."""
    assert sorted(left) == sorted(right), f"names differ: {sorted(set(left) ^ set(right))[:6]}"
    return [name for name in sorted(left) if not torch.equal(left[name], right[name])]
