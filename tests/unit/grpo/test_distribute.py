"""Groups move whole, to where they are trained on, whatever the two layouts."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmrl_core.contracts import Replica, Rollouts
from mmrl_core.grpo.distribute import Layouts, assign, chunk, distribute

SIZE = 2


@dataclass
class Meeting:
    """Where the threads that stand for ranks exchange values."""

    size: int
    values: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=30)


@dataclass(frozen=True)
class ThreadWorld:
    """A World whose ranks are threads."""

    rank: int
    size: int
    meeting: Meeting

    def gather(self, value: Any) -> list[Any]:
        self.meeting.values[self.rank] = value
        self.meeting.barrier.wait()
        values = [self.meeting.values[r] for r in range(self.size)]
        self.meeting.barrier.wait()
        return values


def replicas(size: int, block: int) -> tuple[Replica, ...]:
    """Ranks in blocks of `block`, each block a replica."""
    return tuple(Replica(index=r // block, count=size // block, is_root=r % block == 0) for r in range(size))


def rows_of(groups: list[int]) -> Rollouts:
    ids = [g * SIZE + i for g in groups for i in range(SIZE)]
    n = len(ids)
    return Rollouts(
        group_id=torch.tensor([i // SIZE for i in ids], dtype=torch.int64),
        sample_id=torch.tensor(ids, dtype=torch.int64),
        mask=torch.ones(n, 3, dtype=torch.bool),
        behaviour_log_probs=torch.tensor(ids, dtype=torch.float32)[:, None].expand(n, 3).clone(),
        truncated=torch.zeros(n, dtype=torch.bool),
        policy_version=4,
        payload={"x": [torch.tensor([i]) for i in ids]},
    )


def run_ranks(size: int, layouts: Layouts, holders: dict[int, int]) -> list[Rollouts]:
    meeting = Meeting(size)
    results: list[Any] = [None] * size

    def rank(r: int) -> None:
        mine = sorted(g for g, h in holders.items() if h == layouts.engine[r].index)
        world = ThreadWorld(r, size, meeting)
        results[r] = distribute(rows_of(mine), holders, layouts, world)  # type: ignore[arg-type]

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(size)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return results


@pytest.mark.parametrize(("engine", "backend"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4), (4, 4)])
@pytest.mark.parametrize("groups", [1, 3, 4, 7])
def test_every_group_arrives_once_and_whole(engine: int, backend: int, groups: int) -> None:
    size = 4
    layouts = Layouts(engine=replicas(size, engine), backend=replicas(size, backend))
    engines = size // engine
    holders = {g: (g * g) % engines for g in range(groups)}  # uneven on purpose
    results = run_ranks(size, layouts, holders)
    owner = assign(holders, layouts)
    for r, got in enumerate(results):
        mine = sorted(g for g, o in owner.items() if o == layouts.backend[r].index)
        if not mine:  # a spare row, which no minibatch can name
            assert got.sample_id.tolist() == got.group_id.tolist() == [-1]
            assert got.payload["x"][0].tolist() == [min(holders) * SIZE]
            continue
        want = [g * SIZE + i for g in mine for i in range(SIZE)]
        assert got.sample_id.tolist() == want
        assert [int(x) for x in got.payload["x"]] == want
        assert got.behaviour_log_probs[:, 0].tolist() == want
    # ranks of one backend replica hold the same
    for a in range(size):
        for b in range(size):
            if layouts.backend[a].index == layouts.backend[b].index:
                assert results[a].sample_id.tolist() == results[b].sample_id.tolist()


@given(
    count=st.integers(1, 6),
    holders=st.dictionaries(st.integers(0, 40), st.integers(0, 5), min_size=1, max_size=25),
)
def test_shares_differ_by_one_at_most_and_little_moves(count: int, holders: dict[int, int]) -> None:
    layout = replicas(count, 1)
    held = {g: h % count for g, h in holders.items()}
    owner = assign(held, Layouts(engine=layout, backend=layout))
    sizes = [sum(o == r for o in owner.values()) for r in range(count)]
    assert sorted(owner) == sorted(held)
    assert max(sizes) - min(sizes) <= 1
    before = [sum(h == r for h in held.values()) for r in range(count)]
    moved = sum(owner[g] != held[g] for g in held)
    surplus = sum(max(0, b - s) for b, s in zip(before, sizes, strict=True))
    assert moved == surplus, "only the surplus moves"


@given(groups=st.lists(st.integers(), unique=True, max_size=30), parts=st.integers(1, 8))
def test_chunks_are_even_ordered_and_complete(groups: list[int], parts: int) -> None:
    pieces = chunk(groups, parts)
    assert [g for piece in pieces for g in piece] == groups
    assert all(pieces)
    assert len(pieces) == min(parts, len(groups))
    if pieces:
        assert max(map(len, pieces)) - min(map(len, pieces)) <= 1
