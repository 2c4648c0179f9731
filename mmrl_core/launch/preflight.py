"""Ranks agree before the first step, or the run does not start."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence

from mmrl_core.errors import PreflightError
from mmrl_core.launch.distributed import TIMEOUT_VARIABLE, check_master_address, collective_timeout_s
from mmrl_core.recipe import DEFAULT_DEADLINE_S, RewardChoice
from mmrl_core.world import World

VERSIONED = ("torch", "transformers", "safetensors", "numpy", "mmrl-core")
"""Distributions whose versions ranks must share."""


def preflight(
    world: World,
    *,
    recipe_digest: str,
    plugins_digest: str,
    data_digest: str,
    versions: Mapping[str, str],
    rewards: Sequence[RewardChoice] = (),
) -> None:
    """Compare what must be equal on every rank, and refuse a launch that would hang later. Collective.

    Raises PreflightError, the same on every rank, naming field, ranks and values.
    """
    mine = {"recipe": recipe_digest, "plugins": plugins_digest, "data": data_digest}
    mine |= {f"version of {name}": version for name, version in versions.items()}
    mine["collective time-out"] = f"{collective_timeout_s():g} s"
    problems = disagreements(world.gather(mine))
    problems += [f"reward {r.shown_name}: {problem}" for r in rewards if (problem := _deadline_problem(r))]
    addresses = sorted({a for a in world.gather(os.environ.get("MASTER_ADDR")) if a is not None})
    for address in addresses:
        try:
            check_master_address(address, several_hosts=world.nodes > 1)
        except PreflightError as error:
            problems.append(str(error))
    # names resolve differently on different hosts: what one rank found, every rank raises
    every = [p for rank_problems in world.gather(problems) for p in rank_problems]
    if every:
        raise PreflightError("the ranks cannot start:\n" + "\n".join(f"  {p}" for p in dict.fromkeys(every)))


def disagreements(by_rank: Sequence[Mapping[str, str]]) -> list[str]:
    """One line for each field that is not the same on every rank: the field, and who has which value."""
    fields = dict.fromkeys(field for values in by_rank for field in values)
    lines = []
    for field in fields:
        holders: dict[str, list[int]] = {}
        for rank, values in enumerate(by_rank):
            holders.setdefault(values.get(field, "nothing"), []).append(rank)
        if len(holders) > 1:
            said = "; ".join(f"{_ranks(ranks)}: {value}" for value, ranks in holders.items())
            lines.append(f"{field} differs between ranks ({said}). {_cure(field)}")
    return lines


def installed_versions() -> dict[str, str]:
    """What `preflight` compares: Python and the distributions that shape the numbers."""
    versions = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _deadline_problem(reward: RewardChoice) -> str | None:
    if reward.run != "worker":
        return None
    longest = (reward.deadline_s or DEFAULT_DEADLINE_S) * (1 + reward.retries)
    timeout = collective_timeout_s()
    if longest < timeout:
        return None
    return (
        f"a batch may take {longest:g} s (deadline_s times 1 + retries), but the other ranks give up waiting after "
        f"{timeout:g} s. Lower deadline_s or retries, or raise {TIMEOUT_VARIABLE}"
    )


def _cure(field: str) -> str:
    cures = {
        "recipe": "Give every rank the same file and overrides",
        "data": "Give every host the same data files",
        "collective time-out": f"Set {TIMEOUT_VARIABLE} alike on every host",
    }
    return cures.get(field, "Install the same packages on every host")


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = ", ".join(str(rank) for rank in ranks[:8])
    return f"ranks {shown}{f' and {len(ranks) - 8} more' if len(ranks) > 8 else ''}"
