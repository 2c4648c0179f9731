"""Joins a Ray cluster, or starts one on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import ray

from mmrl_core.errors import PreflightError

_OBJECT_STORE_BYTES = 80 * 2**20
"""Ray's smallest, nearly: the launcher keeps no objects."""

_ATTEMPTS = 3
"""Ray allows a node half a minute to start, which is not enough on a machine that is busy with something else."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node of the cluster."""

    id: str
    address: str
    resources: Mapping[str, float]
    alive: bool


@contextmanager
def connected(address: str | None, local_devices: Mapping[str, int], local_cpus: int) -> Iterator[str]:
    """Inside the block this process is a driver of the cluster; yields what messages call it.

    Args:
        address: of a cluster that answers there; None: start one here.
        local_devices: resources (other than CPU) of a cluster that is started here.
        local_cpus: CPUs that such a cluster offers; ranks may share cores.

    Raises PreflightError when that fails.
    """
    if ray.is_initialized():
        yield "that this process is connected to"
        return
    try:
        if address is None:
            _start_here(local_devices, local_cpus)
        else:
            _join(address)
        yield address or "on this machine"
    finally:
        ray.shutdown()


def nodes() -> list[Node]:
    """The nodes that ever were, in an order that does not change."""
    found = [
        Node(id=n["NodeID"], address=n["NodeManagerAddress"], resources=n["Resources"], alive=n["Alive"])
        for n in ray.nodes()
    ]
    return sorted(found, key=lambda node: (node.address, node.id))


def living() -> list[Node]:
    """Those of `nodes` that are there now."""
    return [node for node in nodes() if node.alive]


def _start_here(devices: Mapping[str, int], cpus: int) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # else ranks get what others leave
    own = dict(devices)
    gpus = own.pop("GPU", None)
    for attempts_left in reversed(range(_ATTEMPTS)):
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                num_gpus=gpus,
                resources={name: float(count) for name, count in own.items()} or None,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level="ERROR",
                _node_ip_address="127.0.0.1",
            )
            return
        except Exception as error:  # Ray raises that very class when the machine is too slow
            ray.shutdown()
            if attempts_left == 0 or "timed out" not in str(error):
                raise PreflightError(f"launcher ray: Ray does not start on this machine: {error}") from error


def _join(address: str) -> None:
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        raise PreflightError(f"launcher ray: cannot join the cluster at {address}: {error}") from error
