"""Options of the launcher `ray`. Imports neither ray nor torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from mmrl_core.recipe import NonNegative, Positive, Spec

Seconds = Annotated[float, Field(ge=0)]

_OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class RayOptions(Spec):
    """`launcher: {name: ray, ...}`."""

    processes: Positive | Literal["auto"] = "auto"
    """Ranks. `auto`: one for each device of the cluster of the recipe's kind; on cpu, one for each node."""
    address: str | None = None
    """The cluster: `HOST:PORT` of its head, `ray://HOST:PORT` through Ray's client server, or `auto` for the one that
    this machine belongs to. null: what RAY_ADDRESS says, and without it a cluster on this machine alone that ends with
    the run."""
    resource: str | None = None
    """Ray's name for one device. null: GPU, NPU or CPU, as the recipe's device says."""
    cpus_per_rank: NonNegative = 1
    """CPUs reserved beside each device; on cpu, those of a rank, at least 1. Ray counts them; nothing is pinned."""
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """How Ray places ranks: together where possible, apart where possible, all on one node, each on its own node."""
    threads_per_process: Positive | None = None
    """Computing threads of a rank. By default OMP_NUM_THREADS of the process that launches; without it the cores of a
    node divided by its ranks."""
    max_restarts: NonNegative = 3
    """How often all ranks start again from the last checkpoint after one was lost: killed by a signal, or gone with
    its node. A rank that ends with an error is not started again."""
    wait_s: Seconds = 0.0
    """How long to wait at the start for devices that the cluster does not have, or that others hold: more than 0 for a
    cluster that grows on demand."""
    restart_wait_s: Seconds = 300.0
    """How long a restart waits for devices in place of those that were lost."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables for every rank, over those of its node."""
    working_dir: str | None = None
    """The folder that ranks run in, the same path on every node. null: the one that mmrl was started in."""

    @field_validator("environment")
    @classmethod
    def _not_ours(cls, value: dict[str, str]) -> dict[str, str]:
        taken = [name for name in value if name in _OURS]
        if taken:
            raise ValueError(f"{', '.join(taken)}: the launcher sets these for each rank")
        return value
