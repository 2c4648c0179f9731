"""Rows of `Rollouts` and `Record`: choosing and joining them. Nothing here changes what a row means."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmrl_core.contracts import Record, Rollouts


def select_rows(rollouts: Rollouts, rows: Tensor | list[int]) -> Rollouts:
    """The given rows, in the given order; a row may be named more than once.

    T stays what it was, because only the policy knows whether trailing actions may be cut. Payload tensors are shared
    with `rollouts`, not copied, so that rows which shared a tensor still do.

    Args:
        rollouts: B rows.
        rows: [b] int64, or a list of row numbers, 0 <= row < B.
    """
    index = _row_numbers(rows, len(rollouts))
    order = torch.tensor(index, dtype=torch.int64, device=rollouts.group_id.device)
    return Rollouts(
        group_id=rollouts.group_id[order],
        sample_id=rollouts.sample_id[order],
        mask=rollouts.mask[order],
        behaviour_log_probs=rollouts.behaviour_log_probs[order],
        truncated=rollouts.truncated[order],
        policy_version=rollouts.policy_version,
        payload=select_record(rollouts.payload, index),
        samples=[rollouts.samples[row] for row in index] if rollouts.samples else [],
    )


def empty_like(rollouts: Rollouts) -> Rollouts:
    """No rows, with the T, dtypes, payload names and policy version of `rollouts`: what an idle replica holds."""
    return select_rows(rollouts, [])


def concatenate(parts: Sequence[Rollouts]) -> Rollouts:
    """All rows of all parts, in order.

    Shorter parts are padded on the right to the largest T: mask False, log-probs 0. Parts without rows add nothing,
    need no payload names and are not looked at, unless there are no others; then the result has no rows either.
    Parts with rows must agree in payload names and policy version, and all or none carry samples (asserted).
    """
    assert parts, "nothing to concatenate"
    filled = [part for part in parts if len(part)]
    if not filled:
        return empty_like(parts[0])
    names = set(filled[0].payload)
    versions = {part.policy_version for part in filled}
    assert all(set(part.payload) == names for part in filled), [sorted(part.payload) for part in filled]
    assert len(versions) == 1, f"rollouts of different policy versions: {sorted(versions)}"
    samples = [sample for part in filled for sample in part.samples]
    assert len(samples) in (0, sum(len(part) for part in filled)), "samples of some rows only"
    width = max(part.mask.shape[1] for part in filled)
    return Rollouts(
        group_id=torch.cat([part.group_id for part in filled]),
        sample_id=torch.cat([part.sample_id for part in filled]),
        mask=torch.cat([_widen(part.mask, width) for part in filled]),
        behaviour_log_probs=torch.cat([_widen(part.behaviour_log_probs, width) for part in filled]),
        truncated=torch.cat([part.truncated for part in filled]),
        policy_version=filled[0].policy_version,
        payload={name: [row for part in filled for row in part.payload[name]] for name in filled[0].payload},
        samples=samples,
    )


def select_record(record: Record, rows: Tensor | list[int]) -> Record:
    """The given rows of every entry, in the given order. Tensors are shared with `record`, not copied."""
    index = rows.tolist() if isinstance(rows, Tensor) else rows
    return {name: [values[row] for row in index] for name, values in record.items()}


def stack_rows(values: Sequence[Tensor], width: int) -> Tensor:
    """[b, width] from b tensors of at most `width` actions each, with 0 on the right."""
    return torch.stack([pad(row, (0, width - row.shape[0])) for row in values])


def _row_numbers(rows: Tensor | list[int], count: int) -> list[int]:
    """As a list, checked: a bool mask or a negative number here would be a mistake that indexing forgives."""
    if isinstance(rows, Tensor):
        assert rows.ndim == 1, rows.shape
        assert rows.dtype == torch.int64, rows.dtype
    index: list[int] = rows.tolist() if isinstance(rows, Tensor) else rows
    assert all(0 <= row < count for row in index), (index, count)
    return index


def _widen(field: Tensor, width: int) -> Tensor:
    """[B, T] -> [B, width], with False or 0 on the right."""
    return pad(field, (0, width - field.shape[1]))
