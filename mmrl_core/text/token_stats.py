"""Log-probabilities and entropy of chosen tokens from hidden states, without keeping [tokens, vocabulary] tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CACHED = 1 << 19
"""Logits worked on at once on a CPU: 2 MB of fp32."""


class _ChosenTokenStats(torch.autograd.Function):
    """(log p(target), entropy) of softmax(logits / temperature), fp32.

    Keeps one [n, V] tensor (the probabilities) where autograd's log_softmax + gather would keep or create three. fp32
    logits that need a gradient become it: fresh memory is slow. Autograd raises if whoever made them needs them.
    d log p_y / dz = onehot(y) - p;  dH / dz_j = -p_j (log p_j + H).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        count, vocabulary = logits.shape
        log_probs = torch.empty(count, dtype=torch.float32, device=logits.device)
        entropy = torch.empty_like(log_probs)
        keep = ctx.needs_input_grad[0]
        probabilities = logits.detach().to(torch.float32) if keep else None
        # on a CPU in rows that stay in its cache: five passes over memory become one
        rows = max(1, CACHED // vocabulary) if logits.device.type == "cpu" else max(1, count)
        for start in range(0, count, rows):
            part = slice(start, start + rows)
            z = logits[part].detach().float() if probabilities is None else probabilities[part]
            z = z / temperature if temperature != 1.0 else z
            z = z - z.amax(-1, keepdim=True)
            chosen = z.gather(-1, targets[part, None])[:, 0]
            p = z.exp() if probabilities is None else torch.exp(z, out=probabilities[part])
            total = p.sum(-1)
            p.div_(total[:, None])
            # a logit of -inf has p = 0; its product must be 0 too
            entropy[part] = total.log() - z.clamp_min_(torch.finfo(z.dtype).min).mul_(p).sum(-1)
            log_probs[part] = chosen - total.log()
        ctx.probabilities, ctx.targets, ctx.temperature, ctx.dtype = probabilities, targets, temperature, logits.dtype
        ctx.entropy = entropy
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None, None]:
        p = ctx.probabilities
        assert p is not None, "the stats of one forward were differentiated twice"
        ctx.probabilities = None  # overwritten below
        g_chosen, g_entropy = gradients
        assert g_chosen is not None
        scale = 1.0 / ctx.temperature
        if g_entropy is not None and bool((g_entropy != 0).any()):
            log_p = p.clamp_min(torch.finfo(p.dtype).tiny).log()
            coefficient = -(g_chosen[:, None] + g_entropy[:, None] * (log_p + ctx.entropy[:, None]))
            p.mul_(coefficient).mul_(scale)
        else:
            p.mul_((g_chosen * -scale)[:, None])
        p.scatter_add_(-1, ctx.targets[:, None], (g_chosen * scale)[:, None])
        return p.to(ctx.dtype), None, None


def token_stats(
    head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, *, temperature: float, logits_bytes: int
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy, both [n] fp32, of `targets` [n] under softmax(head(hidden) / temperature).

    `hidden` is [n, H]; `head` maps it to logits [n, V]. With gradient enabled and more than `logits_bytes` of logits,
    they are computed in chunks that are recomputed in the backward pass. Both outputs are differentiable.
    """
    if hidden.shape[0] == 0:
        empty = hidden.sum(-1).float()
        return empty, empty

    def stats(chunk: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = _ChosenTokenStats.apply(head(chunk), chosen, temperature)  # type: ignore[no-untyped-call]
        return result

    vocabulary = _vocabulary(head, hidden)
    rows = max(1, logits_bytes // (4 * vocabulary))
    if hidden.shape[0] <= rows:
        return stats(hidden, targets)
    pieces = []
    for chunk, chosen in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
        if torch.is_grad_enabled():
            pieces.append(checkpoint(stats, chunk, chosen, use_reentrant=False))
        else:
            pieces.append(stats(chunk, chosen))
    return torch.cat([p[0] for p in pieces]), torch.cat([p[1] for p in pieces])


def _vocabulary(head: Callable[[Tensor], Tensor], hidden: Tensor) -> int:
    size = getattr(head, "out_features", None)
    if isinstance(size, int):
        return size
    with torch.no_grad():
        return int(head(hidden[:1]).shape[-1])
