"""Log-probs and entropy of chosen tokens when each rank has a part of the vocabulary: no logits are gathered."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint


class _VocabularyParallelStats(torch.autograd.Function):
    """(log p(target), entropy) of softmax(logits / temperature) in fp32, from this rank's columns of the logits.

    The ranks exchange three numbers a token. d log p_y / dz = onehot(y) - p;  dH / dz_j = -p_j (log p_j + H).
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, start: int, temperature: float, group: ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        count, width = logits.shape
        z = logits.detach().float()
        z = z / temperature if temperature != 1.0 else z
        highest = z.amax(-1) if width else z.new_full((count,), -torch.inf)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        z = z - highest[:, None]
        here = (targets >= start) & (targets < start + width)
        column = torch.where(here, targets - start, 0)
        chosen = z.gather(-1, column[:, None])[:, 0] if width else highest
        p = z.exp()
        # a logit of -inf has p = 0; its product must be 0 too
        weighted = (z.clamp_min_(torch.finfo(z.dtype).min) * p).sum(-1)
        sums = torch.stack([p.sum(-1), torch.where(here, chosen, 0.0), weighted])
        dist.all_reduce(sums, group=group)
        total, chosen, weighted = sums.unbind()
        entropy = total.log() - weighted / total
        p.div_(total[:, None])
        ctx.save_for_backward(p, column, here, entropy)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        ctx.set_materialize_grads(False)
        return chosen - total.log(), entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
        p, column, here, entropy = ctx.saved_tensors
        g_chosen, g_entropy = gradients
        result = None
        if g_entropy is not None:
            log_p = p.clamp_min(torch.finfo(p.dtype).tiny).log()
            result = -p * (g_entropy[:, None] * (log_p + entropy[:, None]))
        if g_chosen is not None:
            step = p * -g_chosen[:, None]
            if p.shape[1]:
                step.scatter_add_(-1, column[:, None], torch.where(here, g_chosen, 0.0)[:, None])
            result = step if result is None else result.add_(step)
        if result is not None:
            result = (result / ctx.temperature).to(ctx.dtype)
        return result, None, None, None, None


def vocabulary_parallel_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocabulary: int,
    rank: int,
    group: ProcessGroup,
    temperature: float,
    logits_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy, both [n] fp32, of `targets` [n] under softmax(logits / temperature). Collective over
    `group`, whose ranks all get the same.

    Args:
        hidden: [n, H], the same on every rank of the group.
        weight: [rows, H], this rank's rows of the output layer; rows beyond `vocabulary` are padding and left out.
        rank: of this process in the group.
        logits_bytes: fp32 logits alive at once; with gradient enabled larger numbers of tokens are worked on in chunks
            that are recomputed in the backward pass.

    The gradient of `hidden` is this rank's share: the caller sums it over the group.
    """
    start = rank * weight.shape[0]
    rows = max(0, min(weight.shape[0], vocabulary - start))
    real = weight[:rows]

    def stats(chunk: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        logits = nn.functional.linear(chunk, real)
        result: tuple[Tensor, Tensor] = _VocabularyParallelStats.apply(  # type: ignore[no-untyped-call]
            logits, chosen, start, temperature, group
        )
        return result

    # every rank cuts alike, whatever its number of rows
    tokens = max(1, logits_bytes // (4 * weight.shape[0]))
    if hidden.shape[0] <= tokens:
        return stats(hidden, targets)
    pieces = []
    for chunk, chosen in zip(torch.split(hidden, tokens), torch.split(targets, tokens), strict=True):
        if torch.is_grad_enabled():
            pieces.append(checkpoint(stats, chunk, chosen, use_reentrant=False))
        else:
            pieces.append(stats(chunk, chosen))
    return torch.cat([p[0] for p in pieces]), torch.cat([p[1] for p in pieces])
