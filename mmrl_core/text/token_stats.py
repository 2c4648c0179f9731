"""Log-probabilities and entropy of chosen tokens from hidden states, without keeping [tokens, vocabulary] tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class _ChosenTokenStats(torch.autograd.Function):
    """(log p(target), entropy) of softmax(logits / temperature), fp32.

    Keeps one [n, V] tensor (the probabilities) where autograd's log_softmax + gather would keep or create three.
    d log p_y / dz = onehot(y) - p;  dH / dz_j = -p_j (log p_j + H).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        z = logits.detach().float()
        z = z / temperature if temperature != 1.0 else z
        z = z - z.amax(-1, keepdim=True)
        chosen = z.gather(-1, targets[:, None])[:, 0]
        p = z.exp()
        total = p.sum(-1)
        log_total = total.log()
        p.div_(total[:, None])
        # sum p * z without an [n, V] product; exp underflow makes p = 0 where z is very negative, and 0 * z = 0
        entropy = log_total - torch.bmm(p[:, None], z.clamp_min(torch.finfo(z.dtype).min)[:, :, None])[:, 0, 0]
        ctx.probabilities, ctx.targets, ctx.temperature, ctx.dtype = p, targets, temperature, logits.dtype
        ctx.entropy = entropy
        return chosen - log_total, entropy

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
    for chunk, chosen in zip(hidden.split(rows), targets.split(rows), strict=True):
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
