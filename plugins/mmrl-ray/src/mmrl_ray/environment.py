"""The variables of each rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mmrl_core.launch.rank import LOG_VARIABLE
from mmrl_ray.breakpoints import ADDRESS_VARIABLE, DEBUG_VARIABLE
from mmrl_ray.options import RayOptions
from mmrl_ray.placement import Place
from mmrl_ray.rank_process import GLOO_INTERFACE, Host

FORWARDED = ("MMRL_", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "WANDB_", "SWANLAB_")
"""Beginnings of names that ranks get from the launching process. Paths of libraries, networks and devices are a node's
own matter: ranks have them from their node."""
_NOT_FORWARDED = ("MMRL_STORE", "MMRL_RANK_LOG", "MMRL_PARENT_PID", "MMRL_FAILURE_MARK")
VISIBLE = {"GPU": "CUDA_VISIBLE_DEVICES", "NPU": "ASCEND_RT_VISIBLE_DEVICES"}
_BREAKPOINT = "mmrl_ray.breakpoints.set_trace"
_THREADS = "OMP_NUM_THREADS"


def environments(
    places: Sequence[Place],
    hosts: Sequence[Host],
    port: int,
    options: RayOptions,
    resource: str,
    own: Mapping[str, str],
    logs: Path,
    gcs: str,
) -> list[dict[str, str]]:
    """Of each rank, over its node's.

    Args:
        places, hosts: of each rank, in order.
        port: on rank 0's node, for the ranks to meet at.
        own: the launching process's environment.
        logs: the folder for the logs of ranks other than 0.
        gcs: the cluster's address, for breakpoints.
    """
    size = len(places)
    several = any(place.local_size < size for place in places)
    forwarded = {k: v for k, v in own.items() if k.startswith(FORWARDED) and k not in _NOT_FORWARDED}
    made = []
    for place, host in zip(places, hosts, strict=True):
        environment = {
            **forwarded,
            "RANK": str(place.rank),
            "LOCAL_RANK": str(place.local_rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(place.local_size),
            "MASTER_ADDR": hosts[0].address,
            "MASTER_PORT": str(port),
            "PYTHONUNBUFFERED": "1",
            _THREADS: _threads(options, own, host.cores // place.local_size),
        }
        if own.get(DEBUG_VARIABLE) == "legacy":
            environment |= {"PYTHONBREAKPOINT": _BREAKPOINT, ADDRESS_VARIABLE: gcs, DEBUG_VARIABLE: "legacy"}
        if place.rank > 0:
            environment[LOG_VARIABLE] = str(logs / f"rank{place.rank}.log")
        if resource in VISIBLE:
            mates = [h for p, h in zip(places, hosts, strict=True) if p.node.id == place.node.id]
            if all(mate.devices for mate in mates):  # else Ray only counts them, and the node's own variable holds
                environment[VISIBLE[resource]] = ",".join(device for mate in mates for device in mate.devices)
        if several and host.interface is not None and GLOO_INTERFACE not in options.environment:
            # by the host's name gloo may find 127.0.1.1, which nobody else reaches
            environment[GLOO_INTERFACE] = host.interface
        made.append({**environment, **options.environment})
    return made


def _threads(options: RayOptions, own: Mapping[str, str], share: int) -> str:
    if options.threads_per_process is not None:
        return str(options.threads_per_process)
    return own.get(_THREADS) or str(max(1, share))
