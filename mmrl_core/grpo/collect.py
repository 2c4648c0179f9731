"""From prompts to scored groups: what happens in a step before the first gradient.

Every rank ends with the same table of all samples of the step, so that advantages, filters and normalisers are
decided once and identically, whatever holds which rows.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmrl_core.contracts import GenerationRequest, Policy, Prompt, PromptSource, RolloutEngine, Rollouts, Sample
from mmrl_core.errors import DataError, RewardError
from mmrl_core.grpo.advantages import informative_groups
from mmrl_core.grpo.run import Run
from mmrl_core.recipe import RewardChoice
from mmrl_core.rows import concatenate, select_rows

if TYPE_CHECKING:
    from mmrl_core.rewards.executor import RewardExecutor, Scored
    from mmrl_core.world import World

log = logging.getLogger("mmrl.rollout")


@dataclass(frozen=True, kw_only=True)
class SampleRow:
    """One sample of the step, as every rank knows it."""

    group_id: int
    sample_id: int
    holder: int
    """Index of the engine replica that has it."""
    score: float | None
    """Weighted sum of the rewards, or None: failed."""
    drop_group: bool
    rewards: Mapping[str, float]
    """Unweighted value by the reward's name in metrics."""
    sub_scores: Mapping[str, float]
    prompt_length: int | None
    """In tokens; None: the policy has none."""
    response_length: int | None
    """In tokens; None: the policy has none."""
    actions: int
    """Actions that are trained on."""
    truncated: bool


@dataclass(kw_only=True)
class StepBatch:
    """The groups of a step that can be learned from, and the table of everything that was sampled."""

    rollouts: Rollouts
    """This engine replica's rows of kept groups, without failed samples."""
    table: list[SampleRow]
    """All samples of all rounds, by sample id."""
    kept: list[SampleRow]
    """Those that are trained on, by sample id."""
    samples: list[Sample]
    """Some of this rank's decoded samples with their scores, for the observers."""
    rounds: int
    dropped_equal: int
    """Groups left out by dynamic sampling."""
    skipped_prompts: int
    facts: dict[str, float] = field(default_factory=dict)
    """`failures`, `timeouts`, `restarts` of rewards in this step, summed over replicas."""

    @property
    def learnable(self) -> bool:
        """Whether anything is trained on at all."""
        return any(row.actions for row in self.kept)


def seed_of(run_seed: int, step: int, sample_id: int) -> int:
    """A 63-bit seed for one sample: independent of ranks, batching and of every other sample.

    Negative numbers stand for what is no sample: -1 shuffles rewards, -2 - g is shared by group g.
    """
    digest = hashlib.blake2b(f"{run_seed}:{step}:{sample_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def request(run_seed: int, step: int, prompt: Prompt, group_id: int, size: int) -> GenerationRequest:
    """What the engine is asked for `size` samples of `prompt`, ids and seeds included."""
    ids = tuple(range(group_id * size, (group_id + 1) * size))
    return GenerationRequest(
        prompt=prompt,
        group_id=group_id,
        sample_ids=ids,
        seeds=tuple(seed_of(run_seed, step, i) for i in ids),
        group_seed=seed_of(run_seed, step, -2 - group_id),
    )


def collect(run: Run, step: int) -> StepBatch:
    """Generate, score and filter until the step has its groups (or its rounds are used up). Collective."""
    algorithm = run.recipe.algorithm
    rounds = algorithm.dynamic_sampling.max_rounds if algorithm.dynamic_sampling else 1
    table: list[SampleRow] = []
    parts: list[Rollouts] = []
    kept: set[int] = set()
    dropped_equal = skipped = used = 0
    while used < rounds and len(kept) < algorithm.prompts_per_step:
        first_group = used * algorithm.prompts_per_step
        prompts, passed_over = draw(run, algorithm.prompts_per_step)
        skipped += passed_over
        size = algorithm.samples_per_prompt
        requests = [request(run.recipe.seed, step, p, first_group + i, size) for i, p in enumerate(prompts)]
        rollouts, rows = _generate_and_score(run, requests)
        parts.append(rollouts)
        table += rows
        usable, equal = _usable_groups(run, rows)
        dropped_equal += equal
        kept |= usable
        used += 1
    chosen = set(sorted(kept)[: algorithm.prompts_per_step])
    survivors = [row for row in table if row.group_id in chosen and _trainable(run, row)]
    joined = concatenate(parts)
    scores = {row.sample_id: row.score for row in table}
    samples = [replace(s, score=scores[s.sample_id]) for s in joined.samples[: run.recipe.show_samples]]
    joined.samples = []
    alive = {row.sample_id for row in survivors}
    here = select_rows(joined, [i for i, s in enumerate(joined.sample_id.tolist()) if s in alive])
    if algorithm.truncated == "mask":
        here.mask = here.mask & ~here.truncated[:, None]
    return StepBatch(
        rollouts=here,
        table=table,
        kept=survivors,
        samples=samples,
        rounds=used,
        dropped_equal=dropped_equal,
        skipped_prompts=skipped,
        facts=_reward_facts(run),
    )


def draw(run: Run, count: int) -> tuple[list[Prompt], int]:
    """The next `count` prompts that the policy accepts, and how many it passed over. The same on every rank."""
    prompts: list[Prompt] = []
    skipped = 0
    while len(prompts) < count:
        prompt = run.source.prompt(run.progress.cursor)
        run.progress.cursor += 1
        if run.policy.accepts(prompt):
            prompts.append(prompt)
            continue
        skipped += 1
        if skipped >= len(run.source) and not prompts:
            raise DataError(
                f"the policy accepted none of the {len(run.source)} prompts of {run.recipe.data.name}; "
                "see model.policy.max_prompt_tokens"
            )
    return prompts, skipped


def take_prompts(source: PromptSource, policy: Policy, count: int) -> list[Prompt]:
    """The first `count` accepted prompts of a source, each at most once."""
    accepted = (p for p in map(source.prompt, range(len(source))) if policy.accepts(p))
    return [prompt for prompt, _ in zip(accepted, range(count), strict=False)]


def _generate_and_score(run: Run, requests: list[GenerationRequest]) -> tuple[Rollouts, list[SampleRow]]:
    """This engine replica's rollouts, and the rows of all replicas. Scored once per replica."""
    replica = run.engine.replica
    with run.timers("rollout"):
        rollouts = run.engine.generate(requests[replica.index :: replica.count], run.sampling)
    with run.timers("rule_reward"):
        scored = score_everywhere(run.rewards, run.engine, run.world, rollouts.samples)
        local = _rows(run, rollouts, scored, replica.index) if replica.is_root else []
        rows = [row for part in run.world.gather(local) for row in part]
    return rollouts, sorted(rows, key=lambda row: row.sample_id)


def score_everywhere(
    rewards: RewardExecutor, engine: RolloutEngine, world: World, samples: Sequence[Sample]
) -> list[Scored]:
    """Score this engine replica's samples on its root (nothing elsewhere). Collective.

    A reward with `on_failure: stop` raises its RewardError on every rank, not on the one that met it only.
    """
    scored: list[Scored] = []
    problem: str | None = None
    if engine.replica.is_root:
        try:
            scored = rewards.score(samples)
        except RewardError as error:
            problem = str(error)
    problems = [text for text in world.gather(problem) if text is not None]
    if problems:
        raise RewardError(problems[0])
    return scored


def _rows(run: Run, rollouts: Rollouts, scored: Sequence[Scored], holder: int) -> list[SampleRow]:
    tokens = run.policy.lengths(rollouts)
    lengths = [(None, None)] * len(rollouts) if tokens is None else list(zip(*tokens, strict=True))
    actions = rollouts.mask.sum(-1).tolist()
    masked = run.recipe.algorithm.truncated == "mask"
    return [
        SampleRow(
            group_id=int(rollouts.group_id[i]),
            sample_id=int(rollouts.sample_id[i]),
            holder=holder,
            score=result.value,
            drop_group=result.drop_group,
            rewards=result.per_reward,
            sub_scores=result.sub_scores,
            prompt_length=lengths[i][0],
            response_length=lengths[i][1],
            actions=0 if masked and bool(rollouts.truncated[i]) else int(actions[i]),
            truncated=bool(rollouts.truncated[i]),
        )
        for i, result in enumerate(scored)
    ]


def _trainable(run: Run, row: SampleRow) -> bool:
    """Whether this sample counts in its group."""
    return row.score is not None and not (row.truncated and run.recipe.algorithm.truncated == "drop")


def _usable_groups(run: Run, rows: Sequence[SampleRow]) -> tuple[set[int], int]:
    """Groups that can be learned from, and how many were left out only because their rewards are equal."""
    dropped = {row.group_id for row in rows if row.drop_group}
    counted = [row for row in rows if _trainable(run, row) and row.group_id not in dropped]
    sizes: dict[int, int] = {}
    for row in counted:
        sizes[row.group_id] = sizes.get(row.group_id, 0) + 1
    usable = {group for group, size in sizes.items() if size >= 2}
    if run.recipe.algorithm.dynamic_sampling is None:
        return usable, 0
    counted = [row for row in counted if row.group_id in usable]
    if not counted:
        return usable, 0
    if run.recipe.algorithm.advantage.combine == "advantages":  # rewards whose sum is equal may differ one by one
        rewards = reward_columns(counted, [choice for choice in run.recipe.rewards if choice.weight != 0.0])
    else:
        rewards = torch.tensor([[row.score] for row in counted], dtype=torch.float64)
    groups = torch.tensor([row.group_id for row in counted])
    valid = torch.ones(len(counted), dtype=torch.bool)
    informative = set().union(*(informative_groups(column, groups, valid) for column in rewards.unbind(1)))
    return usable & informative, len(usable - informative)


def reward_columns(rows: Sequence[SampleRow], rewards: Sequence[RewardChoice]) -> Tensor:
    """[N, K] float64: the unweighted value of each of these rewards for each row; no row failed."""
    values = [[row.rewards[choice.shown_name] for choice in rewards] for row in rows]
    return torch.tensor(values, dtype=torch.float64).reshape(len(rows), len(rewards))


def _reward_facts(run: Run) -> dict[str, float]:
    """Counters of the reward executors since the last step, summed over engine replicas. Collective."""
    now = run.rewards.counters()
    news = [float(now[name] - run.reward_counters.get(name, 0)) for name in sorted(now)]
    run.reward_counters = now
    total = run.world.sum(torch.tensor(news if run.engine.replica.is_root else [0.0] * len(news), dtype=torch.float64))
    return dict(zip(sorted(now), total.tolist(), strict=True))
