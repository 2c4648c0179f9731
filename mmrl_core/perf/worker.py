"""What every rank of a measured combination runs: the ordinary training loop, a step each time the driver says so."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import mmrl_core
from mmrl_core.contracts import DeviceOps, Rollouts, Sample
from mmrl_core.errors import PerfError
from mmrl_core.grpo.run import Run
from mmrl_core.grpo.trainer import hand_over_weights, train
from mmrl_core.launch import components
from mmrl_core.launch.distributed import connect, disconnect
from mmrl_core.launch.logs import configure_logging
from mmrl_core.launch.observers import NoObservers
from mmrl_core.launch.worker import build
from mmrl_core.perf import machine
from mmrl_core.perf.channel import PROTOCOL, Line
from mmrl_core.perf.phase_memory import PhasePeaks
from mmrl_core.plugins import resolve
from mmrl_core.recipe import load_recipe


class Enough(Exception):
    """The driver asks for no further step."""


def main(recipe_path: Path) -> int:
    """Measure the complete recipe at `recipe_path`, whose folder holds the driver's socket. Returns 0; raises
    MmrlError when the combination cannot be set up."""
    recipe, source = load_recipe(recipe_path)
    selection = resolve(recipe, source)
    configure_logging(recipe.directory, int(os.environ.get("RANK", "0")))
    device = components.create_device(selection)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    with components.create_rewards(recipe, selection, device, local_rank) as rewards:
        world = connect(device)
        try:
            if recipe.deterministic:
                device.set_deterministic(True)
            run = build(recipe, selection, world, device, rewards)
            hand_over_weights(run)
            try:
                Meter(run).run()
            finally:
                run.engine.close()
        except torch.OutOfMemoryError as error:
            raise PerfError(f"out of device memory: {error}\nMeasure a smaller size, or fewer tokens") from error
        finally:
            disconnect()
    return 0


class Meter(NoObservers):
    """Observes the loop, and is asked by it after each step whether to stop. Every rank has one."""

    def __init__(self, loop: Run) -> None:
        self._loop = loop
        self._line = Line.to_driver(loop.recipe.directory) if loop.world.is_main else None
        self._timers = PhasePeaks(loop.device)
        self._step = 0
        self._metrics: Mapping[str, float] = {}
        self._counting = False
        self._flops: list[float | None] = []
        """Of a forward over each batch that this replica sampled, in the step for which that is asked."""

    def run(self) -> None:
        """Train until the driver leaves."""
        loop = self._loop
        loop.observers, loop.timers, loop.stop_requested = self, self._timers, self._after_step
        loop.engine.generate = self._counted(loop.engine.generate)  # type: ignore[method-assign]
        if self._line is not None:
            self._line.send({"ready": self._facts()})
        try:
            self._wait()
            train(loop)
        except Enough:
            return
        finally:
            if self._line is not None:
                self._line.close()

    def step_end(self, step: int, metrics: Mapping[str, float], samples: Sequence[Sample]) -> None:
        """The loop's numbers of the step; its samples are not needed."""
        self._step, self._metrics = step, metrics

    def _after_step(self) -> bool:
        """Tell the driver, and wait for it. Collective."""
        mine = self._flops if self._loop.engine.replica.is_root else []
        ranks = self._loop.world.gather((self._timers.peaks(), mine))
        if self._line is not None:
            counts = [count for _, counts in ranks for count in counts]
            known = [count for count in counts if count is not None]
            self._line.send(
                {
                    "step": self._step,
                    "metrics": dict(self._metrics),
                    "memory": [peaks for peaks, _ in ranks],
                    "flops": sum(known) if known and len(known) == len(counts) else None,
                }
            )
        self._wait()
        return False

    def _wait(self) -> None:
        """Until the driver asks for the next step; raises Enough on every rank when it does not."""
        wish = self._loop.world.broadcast(self._line.receive() if self._line is not None else None)
        if wish is None:
            raise Enough
        self._counting, self._flops = wish["count"], []
        self._timers.watch(wish["memory"])

    def _counted(self, generate: Callable[..., Rollouts]) -> Callable[..., Rollouts]:
        """The engine's `generate`, with the operations of what it sampled counted where time does not matter."""

        def counted(*arguments: Any, **named: Any) -> Rollouts:
            rollouts = generate(*arguments, **named)
            if self._counting:
                self._flops.append(self._loop.policy.flops(rollouts))
            return rollouts

        return counted

    def _facts(self) -> dict[str, Any]:
        loop = self._loop
        return {
            "protocol": PROTOCOL,
            "core": str(Path(mmrl_core.__file__).resolve().parent),
            "fingerprint": machine.fingerprint(
                torch.get_num_threads(), device=loop.device.name, chip=chip_name(loop.device)
            ),
            "ranks": loop.world.size,
            "peak_flops": loop.device.peak_flops(getattr(torch, loop.recipe.model.dtype)),
        }


def chip_name(device: DeviceOps) -> str | None:
    """What the driver calls this rank's accelerator; None on a CPU."""
    if device.name == "cpu":
        return None
    name: str = torch.get_device_module(device.torch_device).get_device_name(device.torch_device)
    return name
