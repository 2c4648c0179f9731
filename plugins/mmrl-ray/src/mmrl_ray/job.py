"""One launch: its ranks on a Ray cluster, started again when one of them is lost."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import ray

from mmrl_core.devices.cores import usable_cores
from mmrl_core.errors import PreflightError
from mmrl_core.launch.distributed import is_loopback
from mmrl_core.launch.logs import RUN_LOG
from mmrl_core.launch.runfolder import write_recipe
from mmrl_core.plugins import load_plugins
from mmrl_core.recipe import Recipe
from mmrl_ray.cluster import connected, living
from mmrl_ray.environment import environments
from mmrl_ray.group import Interrupted, RankGroup, RankLost, log_offsets, say, show_here
from mmrl_ray.interrupts import Interrupts
from mmrl_ray.nodes import check_nodes
from mmrl_ray.options import RayOptions
from mmrl_ray.outcome import Failure, explain, first
from mmrl_ray.placement import Placement, Request, bundle_of, capacity, reserved, resource_of
from mmrl_ray.rank_process import Order


class Job:
    """A number of starts of all ranks."""

    def __init__(self, recipe: Recipe, worker: str, options: RayOptions) -> None:
        self.recipe = recipe
        self.worker = worker
        self.options = options
        self.resource = resource_of(recipe.device.name, options.resource)
        self.bundle = bundle_of(self.resource, options.cpus_per_rank)
        self.working_dir = Path(options.working_dir or Path.cwd())
        self.folder = self.working_dir / recipe.directory

    def _local_cluster(self) -> tuple[dict[str, int], int]:
        """Devices and CPUs of a cluster on this machine alone. Ranks may share its cores, as those of `local` do."""
        cores = usable_cores()
        asked = self.options.processes if self.options.processes != "auto" else 1
        if self.resource == "CPU":
            return {}, max(cores, asked * int(self.bundle["CPU"]))
        count = load_plugins().get("device", self.recipe.device.name).load()().device_count()
        return {self.resource: count}, max(cores, count * self.options.cpus_per_rank)

    def run(self, address: str | None) -> int:
        """On the cluster at `address`, or on one that is started here; returns the exit status."""
        with connected(address, *self._local_cluster()) as cluster, Interrupts() as interrupts:
            return self._run(cluster, interrupts)

    def _run(self, cluster: str, interrupts: Interrupts) -> int:
        """Start all ranks, and again after a loss; returns the exit status."""
        request = Request(
            ranks=self._ranks(cluster), resource=self.resource, bundle=self.bundle, strategy=self.options.strategy
        )
        restarts, wait_s = 0, self.options.wait_s
        while True:
            started = time.monotonic()
            with reserved(request, cluster, wait_s, interrupts.any) as placement:
                if placement is None:
                    return interrupts.status
                group = RankGroup(placement=placement, bundle=self.bundle, interrupts=interrupts, show=show_here)
                logs = log_offsets(self._logs(request.ranks))
                try:
                    self._start(group, placement)
                    group.watch()
                except Interrupted:
                    return interrupts.status
                except RankLost:
                    pass
                finally:
                    group.end()
            if not group.failures:
                return (interrupts.status if interrupts.any() else 137) if group.killed else 0
            cause = first(group.failures)
            if not cause.lost or interrupts.any() or restarts == self.options.max_restarts:
                text = explain(group.failures, group.stopped, request.ranks, logs)
                print(f"{text}\n  after {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
                if cause.lost and restarts and not interrupts.any():
                    say(f"the ranks have been restarted {restarts} times already (launcher.max_restarts)")
                return cause.status
            restarts += 1
            self._say_restart(cause, request.ranks, restarts)
            wait_s = self.options.restart_wait_s
            if self.recipe.checkpoint.resume == "never":  # that was about what was there before this run
                spec = self.recipe.checkpoint.model_copy(update={"resume": "auto"})
                self.recipe = self.recipe.model_copy(update={"checkpoint": spec})
                write_recipe(self.recipe)

    def _start(self, group: RankGroup, placement: Placement) -> None:
        nodes = placement.nodes
        check_nodes(nodes, self.recipe, self.working_dir)
        hosts = group.create(self.resource)
        if len(nodes) > 1 and is_loopback(hosts[0].address):
            raise PreflightError(
                f"launcher ray: the ranks sit on {len(nodes)} nodes, and that of rank 0 calls itself "
                f"{hosts[0].address}, which on the others means themselves. Start every node with "
                "`ray start --node-ip-address=ADDRESS`, the address that the others reach it by"
            )
        slow = sorted({host.address for host in hosts if host.niceness > 0})
        if slow:
            say(
                f"WARNING: on {', '.join(slow)} Ray runs ranks at a low priority (nice "
                f"{max(host.niceness for host in hosts)}): other processes come first. RAY_worker_niceness=0 in the "
                "environment of `ray start` ends that"
            )
        port = group.reserve_port(hosts[0].address)
        logs = self._logs(len(hosts))
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        made = environments(
            placement.places,
            hosts,
            port,
            self.options,
            self.resource,
            os.environ,
            self.folder / "logs",
            ray.get_runtime_context().gcs_address,
        )
        command = ("-m", "mmrl_core.launch.rank", self.worker, str(self.recipe.directory / "recipe.yaml"))
        group.start(
            [
                Order(
                    command=command,
                    environment=environment,
                    working_dir=str(self.working_dir),
                    log=str(logs[rank]) if rank in logs else None,
                    mark=str(self.folder / "logs" / f".rank{rank}.failed"),
                    terminal=_terminal(),
                )
                for rank, environment in enumerate(made)
            ]
        )

    def _ranks(self, cluster: str) -> int:
        if self.options.processes != "auto":
            return self.options.processes
        nodes = living()
        count = capacity([node.resources for node in nodes], self.bundle, self.options.strategy)
        if count == 0:
            raise PreflightError(
                f"launcher ray with processes: auto: the Ray cluster {cluster} has no {self.resource}. Set processes "
                "to a number, or see what `ray status` says"
            )
        return min(count, len(nodes)) if self.resource == "CPU" else count

    def _logs(self, ranks: int) -> dict[int, Path]:
        return {rank: self.folder / "logs" / f"rank{rank}.log" for rank in range(1, ranks)}

    def _say_restart(self, cause: Failure, ranks: int, number: int) -> None:
        hint = f". {cause.hint}" if cause.hint else ""
        text = (
            f"rank {cause.place.rank} of {ranks} {cause.how}{hint}; restart {number} of {self.options.max_restarts}: "
            "all ranks start again from the last checkpoint"
        )
        say(f"WARNING: {text}")
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with (self.folder / RUN_LOG).open("a", encoding="utf-8") as file:
            file.write(f"{stamp},000 WARNING mmrl.ray: {text}\n")


def _terminal() -> tuple[int, int] | None:
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        return None
    size = os.get_terminal_size(sys.stdout.fileno())
    return size.lines, size.columns
