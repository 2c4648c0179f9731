"""Vocabulary-parallel log-probs and entropy against closed forms, and the rows that go in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from mmrl_mindspeed.rows import token_rows
from mmrl_mindspeed.token_stats import vocabulary_parallel_stats
from torch import Tensor

from mmrl_core.contracts import Rollouts
from mmrl_core.testing.stage import Rank


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dist.ProcessGroup]:
    with Rank.join("cpu", tmp_path_factory.mktemp("rank")):
        assert dist.group.WORLD is not None
        yield dist.group.WORLD


@pytest.mark.parametrize("logits_bytes", [1 << 20, 4 * 11 * 2], ids=["at once", "in chunks"])
@pytest.mark.parametrize("which", ["log_probs", "entropy", "both"])
def test_stats_are_those_of_the_softmax(group: dist.ProcessGroup, logits_bytes: int, which: str) -> None:
    """In float64 by autograd; the two padded rows of the weight are in no sum and get no gradient."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 6, generator=draw).requires_grad_()
    weight = torch.randn(11, 6, generator=draw)
    weight[9:] = 100.0
    weight.requires_grad_()
    targets = torch.tensor([0, 8, 3, 3, 5])
    factors = torch.randn(2, 5, generator=draw)
    if which != "both":
        factors[0 if which == "entropy" else 1] = 0

    found = vocabulary_parallel_stats(
        hidden,
        weight,
        targets,
        vocabulary=9,
        rank=0,
        group=group,
        temperature=0.7,
        logits_bytes=logits_bytes,
    )
    used = [
        f * s for f, s, name in zip(factors, found, ("log_probs", "entropy"), strict=True) if which in (name, "both")
    ]
    torch.stack(used).sum().backward()

    exact_hidden, exact_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    logs = (exact_hidden @ exact_weight[:9].T / 0.7).log_softmax(-1)
    exact = logs.gather(-1, targets[:, None])[:, 0], -(logs.exp() * logs).sum(-1)
    (factors.double() * torch.stack(exact)).sum().backward()

    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=2e-6)
    for one, two in ((hidden, exact_hidden), (weight, exact_weight)):
        assert one.grad is not None
        torch.testing.assert_close(one.grad.double(), two.grad, rtol=1e-5, atol=2e-6)
    assert weight.grad is not None
    assert not weight.grad[9:].any()


def rollouts(mask: Tensor) -> Rollouts:
    return Rollouts(
        group_id=torch.zeros(2, dtype=torch.int64),
        sample_id=torch.arange(2),
        mask=mask,
        behaviour_log_probs=torch.zeros(mask.shape),
        truncated=torch.zeros(2, dtype=torch.bool),
        policy_version=0,
        payload={
            "prompt_ids": [torch.tensor([1, 2, 3]), torch.tensor([4])],
            "response_ids": [torch.tensor([5, 6]), torch.tensor([7, 8, 9])],
        },
    )


def test_rows_end_before_the_last_token_and_are_padded_on_the_right() -> None:
    """The last response token is predicted, never fed; each action is predicted by the position before it."""
    mask = torch.tensor([[True, True, False, False], [True, True, True, False]])
    rows = token_rows(rollouts(mask), pad_id=0, multiple=3, device=torch.device("cpu"))
    assert rows.ids.tolist() == [[1, 2, 3, 5, 0, 0], [4, 7, 8, 0, 0, 0]]
    assert rows.targets.tolist() == [5, 6, 7, 8, 9]
    flat = rows.ids.T.reshape(-1)[rows.sources]
    assert flat.tolist() == [3, 5, 4, 7, 8]


def test_rows_without_actions_still_reach_the_model() -> None:
    """A spare row of an idle replica: its weight is 0, but its forward and backward must run."""
    rows = token_rows(rollouts(torch.zeros(2, 3, dtype=torch.bool)), pad_id=0, multiple=1, device=torch.device("cpu"))
    assert rows.taken.sum() == 1
    assert rows.targets.tolist() == [5]


def test_folder_is_found_or_said_to_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmrl_mindspeed.weights import local_folder

    from mmrl_core.errors import ModelError

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert local_folder(str(tmp_path)) == tmp_path
    with pytest.raises(ModelError, match="no such folder"):
        local_folder("nobody/has-this-model")
