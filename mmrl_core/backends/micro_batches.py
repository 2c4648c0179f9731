"""Cutting a minibatch into micro-batches and differentiating a loss slice by slice: shared by training backends.

Plugins may use these functions: they hold the rank rules (every replica runs the same number of micro-batches) and the
loss scopes (see `mmrl_core.contracts.Loss`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmrl_core.contracts import ActionStats, Loss, LossBatch, LossOutput, Minibatch, Rollouts
from mmrl_core.rows import select_record, select_rows, stack_rows
from mmrl_core.world import World


def row_chunks(rollouts: Rollouts, groups_per_chunk: int, *, samples_per_chunk: int | None = None) -> list[list[int]]:
    """Row indices of consecutive whole groups, `groups_per_chunk` groups at a time.

    With `samples_per_chunk` so many rows at a time (the last chunk may have fewer), whatever their groups;
    `groups_per_chunk` then does not apply.
    """
    if samples_per_chunk is not None:
        count = len(rollouts)
        return [list(range(i, min(i + samples_per_chunk, count))) for i in range(0, count, samples_per_chunk)]
    groups: list[list[int]] = []
    previous: int | None = None
    for row, group in enumerate(rollouts.group_id.tolist()):
        if group != previous:
            groups.append([])
            previous = group
        groups[-1].append(row)
    return [
        [row for group in groups[start : start + groups_per_chunk] for row in group]
        for start in range(0, len(groups), groups_per_chunk)
    ]


def padded_chunks(
    rollouts: Rollouts, groups_per_chunk: int, world: World, *, samples_per_chunk: int | None = None
) -> list[tuple[list[int], bool]]:
    """This rank's chunks (see `row_chunks`), as many as the replica with the most has: (rows, real).

    Padding chunks repeat the first row and are not real: their weight is 0. Collective.
    """
    chunks = row_chunks(rollouts, groups_per_chunk, samples_per_chunk=samples_per_chunk)
    count = world.maximum(len(chunks))
    assert chunks or count == 0, "a replica without rows reached the backend; the core gives it a spare one"
    return [(c, True) for c in chunks] + [([0], False)] * (count - len(chunks))


def micro_batches(
    minibatch: Minibatch, groups_per_chunk: int, world: World, *, samples_per_chunk: int | None = None
) -> Iterator[Minibatch]:
    """The minibatch in micro-batches (see `row_chunks`); the same number on every rank, padded with weight 0."""
    chunks = padded_chunks(minibatch.rollouts, groups_per_chunk, world, samples_per_chunk=samples_per_chunk)
    for rows, real in chunks:
        index = torch.tensor(rows, dtype=torch.int64)
        factor = 1.0 if real else 0.0
        yield Minibatch(
            rollouts=select_rows(minibatch.rollouts, rows),
            advantages=minibatch.advantages[index] * factor,
            weight=minibatch.weight[index] * factor,
            metric_weight=minibatch.metric_weight[index] * factor,
            old_log_probs=None if minibatch.old_log_probs is None else minibatch.old_log_probs[index],
            reference=None if minibatch.reference is None else select_record(minibatch.reference, rows),
        )


@dataclass(kw_only=True)
class LossSums:
    """Running totals of a loss's outputs over micro-batches, detached."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)

    def add(self, output: LossOutput) -> None:
        """Add one output."""
        for name, value in {"loss": output.loss, **output.sums}.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        for name, value in output.maxima.items():
            value = value.detach().float()
            self.maxima[name] = torch.maximum(self.maxima[name], value) if name in self.maxima else value

    def reduce(self, world: World, *, contributes: bool = True) -> dict[str, float]:
        """Totals over replicas, the same on every rank. `contributes`: on one rank of each replica. Collective."""
        names, peaks = sorted(self.sums), sorted(self.maxima)
        totals = torch.stack([self.sums[n] for n in names]).cpu().double()
        highest = torch.stack([self.maxima[n] for n in peaks]).cpu().double() if peaks else torch.zeros(0).double()
        if not contributes:
            totals, highest = torch.zeros_like(totals), torch.full_like(highest, -torch.inf)
        world.sum(totals)
        if world.size > 1 and peaks:
            torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
        return dict(zip(names + peaks, [*totals.tolist(), *highest.tolist()], strict=True))


def accumulate(
    replay: Callable[[slice, bool], ActionStats],
    micro_batch: Minibatch,
    loss: Loss,
    slices: Sequence[slice],
    device: torch.device,
) -> LossOutput:
    """Forward and backward of one micro-batch; gradients add up in the parameters.

    `replay(actions, gradient)` returns the stats of a slice of actions. With several slices an `action`-scope loss is
    differentiated slice by slice; a `sequence`-scope loss first sees the whole row without gradient, and dL/dlogp
    (and dL/dentropy, dL/dkl) is fed back slice by slice: one more forward, no more memory.
    """
    if len(slices) == 1:
        output = loss(replay(slices[0], True), loss_batch(micro_batch, slices[0], device))
        output.loss.backward()  # type: ignore[no-untyped-call]
        return output
    totals = LossSums()
    if loss.scope == "action":
        for part in slices:
            output = loss(replay(part, True), loss_batch(micro_batch, part, device))
            output.loss.backward()  # type: ignore[no-untyped-call]
            totals.add(output)
        return LossOutput(loss=totals.sums.pop("loss"), sums=totals.sums, maxima=totals.maxima)
    with torch.no_grad():
        pieces = [replay(part, False) for part in slices]
    whole = ActionStats(
        log_probs=torch.cat([p.log_probs for p in pieces], dim=1),
        entropy=_joined([p.entropy for p in pieces]),
        kl=_joined([p.kl for p in pieces]),
        weight=_joined([p.weight for p in pieces]),
    )
    leaves = [t.requires_grad_() for t in (whole.log_probs, whole.entropy, whole.kl) if t is not None]
    output = loss(whole, loss_batch(micro_batch, slice(0, micro_batch.weight.shape[1]), device))
    gradients = torch.autograd.grad(output.loss, leaves, allow_unused=True)
    for part in slices:
        stats = replay(part, True)
        outputs = [t for t in (stats.log_probs, stats.entropy, stats.kl) if t is not None]
        pairs = [(t, g[:, part]) for t, g in zip(outputs, gradients, strict=True) if g is not None and t.requires_grad]
        torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
    return output


def loss_batch(minibatch: Minibatch, actions: slice, device: torch.device) -> LossBatch:
    """What the loss reads for a slice of actions, on the device."""
    reference = None
    if minibatch.reference is not None and "log_probs" in minibatch.reference:
        recorded = stack_rows(minibatch.reference["log_probs"], minibatch.weight.shape[1])
        reference = recorded[:, actions].to(device)
    old = minibatch.old_log_probs
    return LossBatch(
        advantages=minibatch.advantages.to(device),
        mask=minibatch.rollouts.mask[:, actions].to(device),
        weight=minibatch.weight[:, actions].to(device),
        metric_weight=minibatch.metric_weight[:, actions].to(device),
        behaviour_log_probs=minibatch.rollouts.behaviour_log_probs[:, actions].to(device),
        old_log_probs=None if old is None else old[:, actions].to(device),
        reference_log_probs=reference,
    )


def _joined(pieces: list[Tensor | None]) -> Tensor | None:
    present = [p for p in pieces if p is not None]
    return torch.cat(present, dim=1) if len(present) == len(pieces) else None
