"""Which node holds which ranks: one bundle of resources a rank, reserved together or not at all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from mmrl_core.errors import PreflightError
from mmrl_ray.cluster import Node, living, nodes

RESOURCES = {"cpu": "CPU", "cuda": "GPU", "npu": "NPU"}
"""Ray's word for the devices of a recipe's word."""
_SETTLE_S = 15.0
"""Ray's count of free devices lags behind: that of a run that has just ended comes back within seconds."""
_POLL_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Request:
    """What ranks ask of the cluster."""

    ranks: int
    resource: str
    """The device's."""
    bundle: Mapping[str, float]
    """Of each rank, the device included."""
    strategy: str


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank runs."""

    rank: int
    node: Node
    local_rank: int
    local_size: int
    bundle: int
    """Index in the placement group."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Reserved resources and the ranks on them; ranks of a node are neighbours."""

    group: PlacementGroup
    places: Sequence[Place]

    @property
    def nodes(self) -> list[Node]:
        """Each node once, that of rank 0 first."""
        return list({place.node.id: place.node for place in self.places}.values())


def resource_of(device: str, chosen: str | None) -> str:
    """Ray's name for the recipe's device. Raises PreflightError when nobody says."""
    word = device.rpartition(":")[2]
    if chosen is not None:
        return chosen
    if word not in RESOURCES:
        raise PreflightError(
            f"launcher ray: how Ray counts devices {word!r} is not known. Start nodes with "
            f"`ray start --resources='{{\"{word}\": 8}}'` and say launcher.resource={word}"
        )
    return RESOURCES[word]


def bundle_of(resource: str, cpus: int) -> dict[str, float]:
    """What a rank reserves."""
    if resource == "CPU":
        return {"CPU": float(max(1, cpus))}
    return {resource: 1.0, **({"CPU": float(cpus)} if cpus else {})}


def capacity(cluster: Sequence[Mapping[str, float]], bundle: Mapping[str, float], strategy: str) -> int:
    """How many ranks these nodes (resources of each) can hold."""
    each = [int(min(node.get(name, 0.0) // amount for name, amount in bundle.items())) for node in cluster]
    if strategy == "STRICT_PACK":
        return max(each, default=0)
    if strategy == "STRICT_SPREAD":
        return sum(count > 0 for count in each)
    return sum(each)


@contextmanager
def reserved(
    request: Request, cluster: str, wait_s: float, interrupted: Callable[[], bool]
) -> Iterator[Placement | None]:
    """Reserve for all ranks at once, or raise PreflightError naming how many ranks and how many devices.

    Waits up to `wait_s` for nodes or devices that are not there, and some seconds at least for those that are there but
    not free. Yields None when `interrupted` said so first.
    """
    short_of = _shortage(request, cluster)
    if short_of is not None and wait_s == 0:
        raise PreflightError(short_of)
    group = placement_group([dict(request.bundle)] * request.ranks, strategy=request.strategy)
    try:
        deadline = time.monotonic() + max(wait_s, _SETTLE_S)
        while not group.wait(_POLL_S):
            if interrupted():
                yield None
                return
            if time.monotonic() >= deadline:
                raise PreflightError(_shortage(request, cluster) or _busy(request, cluster))
        yield Placement(group=group, places=_places(group, request.ranks))
    finally:
        remove_placement_group(group)


def _shortage(request: Request, cluster: str) -> str | None:
    """What is missing even when nobody else uses the cluster, or None."""
    found = living()
    room = capacity([node.resources for node in found], request.bundle, request.strategy)
    if room >= request.ranks:
        return None
    devices = sum(node.resources.get(request.resource, 0.0) for node in found)
    by_node = ", ".join(f"{node.address}: {_amounts(node.resources, request.bundle)}" for node in found)
    room_text = f"holds {room}" if room else "holds none"
    return (
        f"launcher ray: {request.ranks} ranks need {request.ranks} {request.resource}, and the Ray cluster {cluster} "
        f"has {devices:g}: with {_amounts(request.bundle, request.bundle)} a rank and strategy {request.strategy} it "
        f"{room_text} of them ({by_node}). Start more nodes, or lower launcher.processes"
    )


def _busy(request: Request, cluster: str) -> str:
    free = ray.available_resources()
    return (
        f"launcher ray: {request.ranks} ranks need {request.ranks} {request.resource}, and of those of the Ray cluster "
        f"{cluster} only {_amounts(free, request.bundle)} are free: something else holds the rest (see `ray status`). "
        "End it, lower launcher.processes, or let launcher.wait_s wait for it"
    )


def _amounts(resources: Mapping[str, float], bundle: Mapping[str, float]) -> str:
    return " and ".join(f"{resources.get(name, 0.0):g} {name}" for name in bundle)


def _places(group: PlacementGroup, ranks: int) -> list[Place]:
    table: dict[str, Any] = placement_group_table(group)
    on: dict[int, str] = {int(bundle): node for bundle, node in table["bundles_to_node_id"].items()}
    by_id = {node.id: node for node in nodes()}
    order = sorted(range(ranks), key=lambda bundle: (min(b for b in on if on[b] == on[bundle]), bundle))
    places = []
    for rank, bundle in enumerate(order):
        mates = [other for other in order if on[other] == on[bundle]]
        places.append(
            Place(
                rank=rank,
                node=by_id[on[bundle]],
                local_rank=mates.index(bundle),
                local_size=len(mates),
                bundle=bundle,
            )
        )
    return places
