"""Moving groups from the engine replicas that sampled them to the backend replicas that train on them.

The one place where the two layouts meet. Groups stay whole; who gets what is computed identically on every rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mmrl_core.contracts import Replica, Rollouts
from mmrl_core.rows import concatenate, select_rows
from mmrl_core.world import World


@dataclass(frozen=True, kw_only=True)
class Layouts:
    """Of every rank: its engine replica and its backend replica."""

    engine: tuple[Replica, ...]
    backend: tuple[Replica, ...]

    @classmethod
    def gather(cls, world: World, engine: Replica, backend: Replica) -> Layouts:
        """Collective."""
        pairs = world.gather((engine, backend))
        return cls(engine=tuple(e for e, _ in pairs), backend=tuple(b for _, b in pairs))

    @property
    def same(self) -> bool:
        """Every rank has the same place in both."""
        return all((e.index, e.count) == (b.index, b.count) for e, b in zip(self.engine, self.backend, strict=True))


def assign(holders: Mapping[int, int], layouts: Layouts) -> dict[int, int]:
    """Backend replica of each group, given the engine replica that holds it.

    Shares differ by one group at most. With equal layouts groups stay where they are and only the surplus moves.
    """
    count = layouts.backend[0].count
    groups = sorted(holders)
    if not layouts.same:
        return {group: position % count for position, group in enumerate(groups)}
    shares: list[list[int]] = [[] for _ in range(count)]
    for group in groups:
        shares[holders[group]].append(group)
    while True:
        largest = max(range(count), key=lambda i: (len(shares[i]), -i))
        smallest = min(range(count), key=lambda i: (len(shares[i]), i))
        if len(shares[largest]) - len(shares[smallest]) <= 1:
            return {group: replica for replica, share in enumerate(shares) for group in share}
        shares[smallest].append(shares[largest].pop())


def distribute(rollouts: Rollouts, holders: Mapping[int, int], layouts: Layouts, world: World) -> Rollouts:
    """This rank's backend replica's rows, ordered by sample id. Collective.

    A backend replica without any group receives one row of the first group as a spare, with the ids -1: it belongs to
    no minibatch, but lets the replica take part in collective passes with weight 0.
    """
    assert holders, "nothing to distribute"
    owner = assign(holders, layouts)
    wanted: list[set[int]] = []
    for replica in layouts.backend:
        mine = {group for group, to in owner.items() if to == replica.index}
        wanted.append(mine or {min(holders)})
    held = [{g for g, h in holders.items() if h == replica.index} for replica in layouts.engine]
    moving = set().union(*(want - have for want, have in zip(wanted, held, strict=True)))
    parts = [_groups(rollouts, wanted[world.rank] & held[world.rank])]
    if moving:
        offered = moving & held[world.rank] if layouts.engine[world.rank].is_root else set()
        for group_rows in world.gather(_groups(rollouts, offered)):
            parts.append(_groups(group_rows, wanted[world.rank] - held[world.rank]))
    joined = concatenate(parts)
    order = sorted(range(len(joined)), key=lambda row: int(joined.sample_id[row]))
    mine = {group for group, to in owner.items() if to == layouts.backend[world.rank].index}
    if mine:
        return select_rows(joined, order)
    spare = select_rows(joined, order[:1])
    spare.group_id, spare.sample_id = torch.full_like(spare.group_id, -1), torch.full_like(spare.sample_id, -1)
    return spare


def _groups(rollouts: Rollouts, groups: set[int]) -> Rollouts:
    return select_rows(rollouts, [row for row, g in enumerate(rollouts.group_id.tolist()) if g in groups])


def chunk(groups: Sequence[int], parts: int) -> list[list[int]]:
    """Groups in `parts` consecutive lists whose sizes differ by one at most; empty lists are left out."""
    bounds = [len(groups) * i // parts for i in range(parts + 1)]
    return [list(groups[a:b]) for a, b in itertools.pairwise(bounds) if b > a]
