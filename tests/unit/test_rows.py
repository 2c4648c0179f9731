"""Choosing and joining rows."""

from __future__ import annotations

import pytest
import torch

from mmrl_core.contracts import Prompt, Rollouts, Sample
from mmrl_core.rows import concatenate, empty_like, select_record, select_rows


def made(first, rows, width, *, samples=True, version=3, names=("ids", "latents")):
    ids = torch.arange(first, first + rows)
    prompt = Prompt(index=0, text="q")
    return Rollouts(
        group_id=ids // 2,
        sample_id=ids,
        mask=torch.ones(rows, width, dtype=torch.bool),
        behaviour_log_probs=-ids[:, None].float() - torch.arange(1, width + 1) / 10,
        truncated=ids % 2 == 0,
        policy_version=version,
        payload={name: [torch.full((i + 1,), first + i) for i in range(rows)] for name in names},
        samples=[Sample(sample_id=int(i), group_id=int(i) // 2, prompt=prompt) for i in ids] if samples else [],
    )


@pytest.mark.parametrize("as_tensor", [False, True])
def test_selected_rows_are_the_rows_in_order(as_tensor):
    whole = made(10, 5, 3)
    rows = [4, 0, 0, 2]
    part = select_rows(whole, torch.tensor(rows) if as_tensor else rows)
    assert part.sample_id.tolist() == [14, 10, 10, 12]
    assert part.group_id.tolist() == [7, 5, 5, 6]
    assert part.truncated.tolist() == [True, True, True, True]
    assert torch.equal(part.behaviour_log_probs, whole.behaviour_log_probs[rows])
    assert part.mask.shape == (4, 3)
    assert [sample.sample_id for sample in part.samples] == [14, 10, 10, 12]
    assert part.policy_version == 3
    for name in whole.payload:
        assert all(got is whole.payload[name][row] for got, row in zip(part.payload[name], rows, strict=True))
    assert select_rows(made(0, 2, 3, samples=False), [1]).samples == []


@pytest.mark.parametrize("rows", [torch.tensor([True, False]), [-1], [2], torch.tensor([[0]])])
def test_rows_that_indexing_would_forgive_are_refused(rows):
    with pytest.raises(AssertionError):
        select_rows(made(0, 2, 3), rows)


def test_concatenation_pads_on_the_right_and_is_undone_by_selection():
    parts = [made(0, 2, 3), made(2, 1, 5), made(3, 3, 1)]
    whole = concatenate(parts)
    assert len(whole) == 6
    assert whole.sample_id.tolist() == list(range(6))
    assert whole.mask.sum(1).tolist() == [3, 3, 5, 1, 1, 1]
    assert whole.mask.dtype == torch.bool
    assert (whole.behaviour_log_probs[~whole.mask] == 0).all()
    start = 0
    for part in parts:
        rows = list(range(start, start + len(part)))
        back = select_rows(whole, rows)
        width = part.mask.shape[1]
        assert torch.equal(back.behaviour_log_probs[:, :width], part.behaviour_log_probs)
        assert torch.equal(back.mask[:, :width], part.mask)
        assert back.samples == part.samples
        assert all(a is b for n in part.payload for a, b in zip(back.payload[n], part.payload[n], strict=True))
        start += len(part)


def test_parts_without_rows_add_nothing():
    full = made(0, 2, 3)
    strange = made(0, 0, 9, version=0, names=())
    whole = concatenate([strange, full, empty_like(full)])
    assert whole.mask.shape == (2, 3)
    assert whole.policy_version == 3
    assert whole.sample_id.tolist() == [0, 1]
    assert len(concatenate([empty_like(full), empty_like(full)])) == 0


def test_empty_like_keeps_form():
    empty = empty_like(made(0, 2, 3))
    assert len(empty) == 0
    assert empty.mask.shape == (0, 3)
    assert empty.mask.dtype == torch.bool
    assert empty.sample_id.dtype == torch.int64
    assert empty.behaviour_log_probs.dtype == torch.float32
    assert empty.payload == {"ids": [], "latents": []}
    assert empty.samples == []


def test_parts_that_do_not_belong_together_are_refused():
    for other in (
        made(2, 2, 3, names=("ids",)),
        made(2, 2, 3, version=4),
        made(2, 2, 3, samples=False),
    ):
        with pytest.raises(AssertionError):
            concatenate([made(0, 2, 3), other])
    with pytest.raises(AssertionError):
        concatenate([])


def test_records_are_selected_by_row():
    record = {"log_probs": [torch.tensor([float(i)]) for i in range(4)]}
    assert [float(x) for x in select_record(record, torch.tensor([3, 1]))["log_probs"]] == [3.0, 1.0]
    assert select_record(record, [2])["log_probs"][0] is record["log_probs"][2]
    assert select_record({}, [0]) == {}
