"""Which samples an optimizer step learns from, and that every sample counts once, wherever its rows are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmrl_core.contracts import Minibatch, Replica, Rollouts
from mmrl_core.grpo.collect import SampleRow, request, seed_of
from mmrl_core.grpo.distribute import Layouts, distribute
from mmrl_core.grpo.minibatches import build_minibatch, split_samples
from mmrl_core.recipe import AlgorithmSpec
from mmrl_core.rows import concatenate, select_rows

WIDTH = 4


def row(sample: int, group: int, actions: int = 2) -> SampleRow:
    return SampleRow(
        group_id=group,
        sample_id=sample,
        holder=0,
        score=1.0,
        drop_group=False,
        rewards={},
        sub_scores={},
        prompt_length=None,
        response_length=None,
        actions=actions,
        truncated=False,
    )


def kept_rows(sizes: list[int], stride: int = 100) -> list[SampleRow]:
    return [row(g * stride + k, g, actions=1 + (g + k) % WIDTH) for g, size in enumerate(sizes) for k in range(size)]


def algorithm(**fields: Any) -> AlgorithmSpec:
    return AlgorithmSpec(**{"steps": 1, "prompts_per_step": 40, "samples_per_prompt": 40, **fields})


def rollouts_of(rows: list[SampleRow]) -> Rollouts:
    return Rollouts(
        group_id=torch.tensor([r.group_id for r in rows]),
        sample_id=torch.tensor([r.sample_id for r in rows]),
        mask=torch.arange(WIDTH) < torch.tensor([r.actions for r in rows])[:, None],
        behaviour_log_probs=torch.zeros(len(rows), WIDTH),
        truncated=torch.zeros(len(rows), dtype=torch.bool),
        policy_version=0,
        payload={"x": [torch.tensor(r.sample_id) for r in rows]},
    )


# ------------------------------------------------------------------------------------------------------------ the split


@given(
    sizes=st.lists(st.integers(2, 6), min_size=1, max_size=9),
    count=st.integers(1, 9),
    split=st.sampled_from(["groups", "samples"]),
)
def test_every_sample_is_in_one_minibatch(sizes: list[int], count: int, split: str) -> None:
    kept = kept_rows(sizes)
    parts = split_samples(kept, algorithm(minibatches=count, minibatch_split=split))
    assert sorted(s for part in parts for s in part) == [r.sample_id for r in kept]
    assert 1 <= len(parts) <= count
    assert all(parts)


@given(sizes=st.lists(st.integers(2, 6), min_size=1, max_size=9), count=st.integers(1, 9))
def test_groups_stay_whole_by_default(sizes: list[int], count: int) -> None:
    kept = kept_rows(sizes)
    parts = split_samples(kept, algorithm(minibatches=count))
    groups = [{s // 100 for s in part} for part in parts]
    assert sum(len(g) for g in groups) == len(sizes)
    assert max(map(len, groups)) - min(map(len, groups)) <= 1
    assert [g for part in groups for g in sorted(part)] == list(range(len(sizes)))


@given(sizes=st.lists(st.integers(2, 12), min_size=1, max_size=5), count=st.integers(1, 6))
def test_samples_are_an_equal_share_of_every_group(sizes: list[int], count: int) -> None:
    kept = kept_rows(sizes)
    parts = split_samples(kept, algorithm(minibatches=count, minibatch_split="samples"))
    for group, size in enumerate(sizes):
        shares = [sum(s // 100 == group for s in part) for part in parts]
        assert sum(shares) == size
        assert max(shares) - min(shares) <= 1
    if min(sizes) >= count:
        assert len(parts) == count
        assert all(len({s // 100 for s in part}) == len(sizes) for part in parts), "every group is in every update"


def test_row_k_of_a_group_goes_where_the_documentation_says() -> None:
    parts = split_samples(kept_rows([6, 6]), algorithm(minibatches=3, minibatch_split="samples"))
    assert parts == [{0, 1, 100, 101}, {2, 3, 102, 103}, {4, 5, 104, 105}]


def test_minibatches_without_actions_are_left_out() -> None:
    kept = [row(0, 0, 0), row(1, 0, 3), row(2, 1, 0), row(3, 1, 0)]
    assert split_samples(kept, algorithm(minibatches=2)) == [{0, 1}]
    assert split_samples(kept, algorithm(minibatches=2, minibatch_split="samples")) == [{1, 3}]


# ----------------------------------------------------------------------------------------------------------- the shares


def shares(kept: list[SampleRow], ranks: int, spec: AlgorithmSpec) -> list[list[Minibatch]]:
    """By minibatch, every replica's share, after the groups have moved to where they are trained on."""
    layout = tuple(Replica(index=r, count=ranks, is_root=True) for r in range(ranks))
    holders = {r.group_id: 0 for r in kept}
    everything = rollouts_of(kept)
    held = [everything if r == 0 else select_rows(everything, []) for r in range(ranks)]

    class Told:
        """What a gather of all ranks would bring."""

        def __init__(self, rank: int) -> None:
            self.rank, self.size = rank, ranks

        def gather(self, value: Rollouts) -> list[Rollouts]:
            return [concatenate([everything]), *[select_rows(everything, [])] * (ranks - 1)]

    layouts = Layouts(engine=layout, backend=layout)
    mine = [distribute(held[r], holders, layouts, Told(r)) for r in range(ranks)]  # type: ignore[arg-type]
    advantages = {r.sample_id: float(r.sample_id) for r in kept}
    return [
        [
            build_minibatch(
                rollouts, samples, kept, advantages, spec, max_actions=9, old_log_probs=None, reference=None
            )
            for rollouts in mine
        ]
        for samples in split_samples(kept, spec)
    ]


def weighted(minibatches: list[Minibatch]) -> dict[int, list[float]]:
    """Weights by sample id; a sample that counts on two replicas is a mistake."""
    found: dict[int, list[float]] = {}
    for part in minibatches:
        for i, sample in enumerate(part.rollouts.sample_id.tolist()):
            if part.weight[i].any():
                assert sample not in found, f"sample {sample} counts twice"
                found[sample] = part.weight[i].tolist()
    return found


@pytest.mark.parametrize("split", ["groups", "samples"])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_shares_add_up_to_the_minibatch_of_one_rank(split: str, aggregation: str, ranks: int) -> None:
    kept = kept_rows([4, 3, 4])  # with 5 ranks two have no group, with `groups` most have none of a minibatch
    spec = algorithm(minibatches=3, minibatch_split=split, loss={"aggregation": aggregation})
    alone, spread = shares(kept, 1, spec), shares(kept, ranks, spec)
    assert len(alone) == len(spread) == 3
    for whole, parts in zip(alone, spread, strict=True):
        assert weighted(parts) == weighted(whole)
        total = sum(float(part.metric_weight.sum()) for part in parts)
        assert total == pytest.approx(1.0)
        if aggregation != "seq-mean-token-sum-norm":
            assert sum(float(part.weight.sum()) for part in parts) == pytest.approx(1.0)
        for part in parts:
            assert len(part.rollouts) >= 1, "every replica takes part in every update"
            real = part.weight.any(1)
            assert torch.equal(part.advantages[real], part.rollouts.sample_id[real].float())


def test_by_samples_every_replica_with_a_group_has_work_in_every_update() -> None:
    spec = algorithm(minibatches=4, minibatch_split="samples")
    for parts in shares(kept_rows([4, 4]), 2, spec):
        assert [len(part.rollouts) for part in parts] == [1, 1]
        assert all(part.weight.any() for part in parts)


# ------------------------------------------------------------------------------------------------------------ the seeds


def test_samples_and_groups_have_seeds_of_their_own() -> None:
    from mmrl_core.contracts import Prompt

    asked = [request(7, step, Prompt(index=g, text="?"), g, 4) for step in (1, 2) for g in range(5)]
    seeds = [s for r in asked for s in (*r.seeds, r.group_seed)]
    seeds += [seed_of(7, step, -1) for step in (1, 2)]
    assert len(set(seeds)) == len(seeds)
    assert asked[6].sample_ids == (4, 5, 6, 7)
    assert asked[6].group_seed == seed_of(7, 2, -3)
