"""Rollouts without training: generate, score, save. What `mmrl rollout` does."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrl_core.contracts import DenoisingPolicy, DeviceOps, GenerationRequest, Policy, RolloutEngine
from mmrl_core.errors import MediaError, MmrlError, RolloutError
from mmrl_core.grpo.collect import request, score_everywhere, take_prompts
from mmrl_core.launch import components
from mmrl_core.launch.distributed import connect, disconnect
from mmrl_core.launch.preflight import installed_versions, preflight
from mmrl_core.launch.rollout_folder import RolloutFolder, Row, save_sample
from mmrl_core.media.videos import require_pyav
from mmrl_core.packaged_models import local_path
from mmrl_core.plugins import Selection
from mmrl_core.recipe import Recipe
from mmrl_core.rewards.executor import RewardExecutor
from mmrl_core.world import World

Progress = Callable[[int, int], None]
"""Called with (prompts done, prompts in all)."""

PROMPTS_AT_ONCE = 16
"""Prompts that an engine replica generates for at once when samples are texts. Pictures take long enough one by one:
what is done is kept after each."""
DEFAULT_FPS = 16.0
"""Frames a second of videos when the policy's sampling has no `fps`."""


@dataclass(frozen=True, kw_only=True)
class RolloutJob:
    """What to generate."""

    output: Path
    """The folder to write, or to go on with."""
    prompts: int | None
    """How many; None: all."""
    samples: int
    """Samples a prompt."""
    held_out: bool = False
    """Prompts and sampling of the recipe's `eval` section."""
    model: str | None = None
    """A model folder instead of the recipe's, or None."""
    batch_prompts: int | None = None
    """Prompts at once on each engine replica; None: 1 for images and video, PROMPTS_AT_ONCE for text."""
    overwrite: bool = False
    """Start anew even if the folder holds rollouts."""


@dataclass(frozen=True, kw_only=True)
class RolloutSummary:
    """What the folder holds at the end."""

    prompts: int
    samples: int
    found: int
    """Prompts that were done before."""
    failed: int
    """Samples without a reward."""
    first_failure: str | None
    mean: float | None
    """Mean reward over the samples that have one; None: no sample has."""
    per_reward: Mapping[str, float]
    """Mean of each reward, before its weight, over the samples where it did not fail."""
    sheet_prompts: int
    """Prompts on the contact sheet; 0: there is none."""


def rollout(
    recipe: Recipe, selection: Selection, job: RolloutJob, progress: Progress = lambda done, total: None
) -> RolloutSummary | None:
    """Generate and score the prompts that are not in the folder yet; None on ranks other than 0.

    `recipe` is complete (see `mmrl_core.resolved.complete`). The engine loads the model by itself. A reward that fails
    is recorded with its sample, whatever its `on_failure` says. Raises RolloutError when the folder holds something
    else, RewardError when a reward cannot be run at all, MediaError when a picture cannot be stored.
    """
    assert selection.eval_data is not None or not job.held_out
    recipe = _recipe_of(recipe, job)
    device = components.create_device(selection)
    rank = os.environ.get("LOCAL_RANK", "")
    with components.create_rewards(recipe, selection, device, int(rank) if rank.isdigit() else 0) as rewards:
        world = connect(device)
        try:
            return _rollout(recipe, selection, job, world, device, rewards, progress)
        finally:
            disconnect()


def _rollout(
    recipe: Recipe,
    selection: Selection,
    job: RolloutJob,
    world: World,
    device: DeviceOps,
    rewards: RewardExecutor,
    progress: Progress,
) -> RolloutSummary | None:
    if recipe.deterministic:
        device.set_deterministic(True)
    selected = selection.eval_data if job.held_out else selection.data
    assert selected is not None
    source = components.create_source(selected, recipe.seed)
    settings = _settings(recipe, job, source.digest())
    preflight(
        world,
        recipe_digest=components.digest([settings, job.prompts, job.batch_prompts]),
        plugins_digest=selection.digest(),
        data_digest=source.digest(),
        versions=installed_versions(),
        rewards=recipe.rewards,
    )
    sampling = selection.eval_sampling if job.held_out else selection.sampling
    policy = components.create_policy(selection, recipe.model)
    if getattr(sampling, "frames", 1) > 1:
        require_pyav("storing videos")  # now, and not after the first of them was generated
    prompts = take_prompts(source, policy, len(source) if job.prompts is None else job.prompts)
    folder, done = _open(job, settings, world)
    waiting = [group for group in range(len(prompts)) if group not in done]
    if waiting:
        device.seed(recipe.seed)
        engine: RolloutEngine = selection.rollout.create()
        engine.setup(components.context(recipe, world, device), policy, None)
        rewards.setup()
        if not engine.replica.is_root:
            rewards.close()
        at_once = (job.batch_prompts or _prompts_at_once(policy)) * engine.replica.count
        progress(len(prompts) - len(waiting), len(prompts))
        for start in range(0, len(waiting), at_once):
            groups = waiting[start : start + at_once]
            # step 0: no training step shares its seeds, and evaluation draws the same samples
            requests = [request(recipe.seed, 0, prompts[group], group, job.samples) for group in groups]
            rows = _generate(requests, sampling, job.output, engine, rewards, world)
            if folder is not None:
                folder.append(rows)
            progress(len(prompts) - len(waiting) + start + len(groups), len(prompts))
        engine.close()
    return None if folder is None else _finish(folder, recipe.name, len(done))


def _generate(
    requests: Sequence[GenerationRequest],
    sampling: Any,
    folder: Path,
    engine: RolloutEngine,
    rewards: RewardExecutor,
    world: World,
) -> list[Row]:
    """Samples of all requests, scored and stored; every rank gets the rows of all. Collective."""
    replica = engine.replica
    own = requests[replica.index :: replica.count]
    rollouts = engine.generate(own, sampling)
    scored = score_everywhere(rewards, engine, world, rollouts.samples)
    places = {i: (n, r.seeds[n]) for r in own for n, i in enumerate(r.sample_ids)}
    fps = getattr(sampling, "fps", DEFAULT_FPS)
    rows: list[Row] = []
    problem: str | None = None
    try:
        for sample, result in zip(rollouts.samples, scored, strict=False):  # scored on replica roots only
            number, seed = places[sample.sample_id]
            rows.append(save_sample(folder, sample, number, result, seed, fps))
    except MediaError as error:
        problem = str(error)
    gathered = world.gather((rows, problem))
    _raise_first([text for _, text in gathered], MediaError)
    return [row for part, _ in gathered for row in part]


def _open(job: RolloutJob, settings: Mapping[str, Any], world: World) -> tuple[RolloutFolder | None, set[int]]:
    """Rank 0's folder, and on every rank the prompts that are done. Collective."""
    folder: RolloutFolder | None = None
    problem: str | None = None
    if world.is_main:
        try:
            folder = RolloutFolder.open(job.output, settings, job.samples, overwrite=job.overwrite)
        except RolloutError as error:
            problem = str(error)
    _raise_first([world.broadcast(problem)], RolloutError)
    return folder, world.broadcast(folder.groups if folder is not None else set())


def _finish(folder: RolloutFolder, name: str, found: int) -> RolloutSummary:
    values = [row["reward"] for row in folder.rows if row["reward"] is not None]
    mean = sum(values) / len(values) if values else None
    names = dict.fromkeys(reward for row in folder.rows for reward in row["rewards"])
    per_reward = {n: _mean([row["rewards"][n] for row in folder.rows if n in row["rewards"]]) for n in names}
    sheet = folder.finish(f"{name}: " + ("no reward" if mean is None else f"mean reward {mean:.4g}"))
    return RolloutSummary(
        prompts=len(folder.groups),
        samples=len(folder.rows),
        found=found,
        failed=len(folder.rows) - len(values),
        first_failure=next((row["failure"] for row in folder.rows if row["failure"]), None),
        mean=mean,
        per_reward=per_reward,
        sheet_prompts=sheet,
    )


def _recipe_of(recipe: Recipe, job: RolloutJob) -> Recipe:
    """With the job's model, merged weights, and rewards whose failures do not stop it."""
    path = job.model or recipe.model.path
    own = path == recipe.model.path  # other folders have their weights in them
    model = {"path": local_path(path), "lora": None, "init_from": recipe.model.init_from if own else None}
    rewards = [
        choice.model_copy(update={"on_failure": "drop_sample"}) if choice.on_failure == "stop" else choice
        for choice in recipe.rewards
    ]
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=model), "rewards": rewards})


def _settings(recipe: Recipe, job: RolloutJob, data_digest: str) -> dict[str, Any]:
    """What shapes the samples and their rewards, as JSON values: an interrupted job must share it."""
    values = recipe.model_dump(mode="json")
    section = values["eval"] if job.held_out else values
    kept = {name: values[name] for name in ("seed", "deterministic", "model", "rollout", "rewards")}
    return {
        **kept,
        "data": section["data"],
        "sampling": section["sampling"],
        "samples_per_prompt": job.samples,
        "data_digest": data_digest,
    }


def _prompts_at_once(policy: Policy) -> int:
    return 1 if isinstance(policy, DenoisingPolicy) else PROMPTS_AT_ONCE


def _raise_first(problems: Sequence[str | None], kind: type[MmrlError]) -> None:
    """On every rank alike, what any of them met."""
    for problem in problems:
        if problem is not None:
            raise kind(problem)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
