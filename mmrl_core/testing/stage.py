"""What checks of policies, backends and engines stand on: a connected rank, and components made from a recipe."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrl_core.contracts import DeviceOps, RolloutEngine, RunContext, TrainingBackend, TrainingSpec
from mmrl_core.launch import components
from mmrl_core.launch.distributed import connect, disconnect
from mmrl_core.plugins import Selection, load_plugins, resolve
from mmrl_core.recipe import Recipe, load_recipe
from mmrl_core.testing.tiny import write_recipe_file
from mmrl_core.world import World

TOTAL_UPDATES = 100
"""What backends of the checks are told about the length of the run."""


@dataclass(frozen=True, kw_only=True)
class Rank:
    """This process as one rank of a run."""

    world: World
    device: DeviceOps
    folder: Path
    """For files of the checks."""

    @classmethod
    @contextmanager
    def join(cls, device: str, folder: Path) -> Iterator[Rank]:
        """Join the process group exactly as a run does, on the device of this name; leave it after the block."""
        ops: DeviceOps = load_plugins().get("device", device).load()()
        world = connect(ops)
        try:
            yield cls(world=world, device=ops, folder=folder)
        finally:
            disconnect()

    def cast(self, recipe: Mapping[str, Any]) -> Cast:
        """The components that a recipe (plain values) names. Raises RecipeError."""
        path = write_recipe_file(self.folder / f"recipe-{self.world.rank}.yaml", recipe)
        return self.cast_file(path)

    def cast_file(self, path: Path) -> Cast:
        """The same from a recipe file."""
        recipe, source = load_recipe(path)
        selection = resolve(recipe, source)
        policy = components.create_policy(selection, recipe.model)
        self.device.seed(recipe.seed)
        return Cast(
            recipe=recipe,
            selection=selection,
            policy=policy,
            context=components.context(recipe, self.world, self.device),
        )


@dataclass(frozen=True, kw_only=True)
class Cast:
    """The components of one recipe."""

    recipe: Recipe
    selection: Selection
    policy: Any
    """A TokenPolicy or a DenoisingPolicy, as the recipe says."""
    context: RunContext

    def backend(self, *, reference: bool = False) -> TrainingBackend:
        """A fresh training backend, set up. Collective."""
        backend: TrainingBackend = self.selection.backend.create()
        spec = TrainingSpec(optimizer=self.recipe.optimizer, total_updates=TOTAL_UPDATES, reference=reference)
        backend.setup(self.context, self.policy, spec)
        return backend

    def engine(self, backend: TrainingBackend | None) -> RolloutEngine:
        """A fresh rollout engine, set up. Collective."""
        engine: RolloutEngine = self.selection.rollout.create()
        engine.setup(self.context, self.policy, backend)
        return engine


def run_ranks(module: str, arguments: list[str], ranks: int, folder: Path, timeout_s: float = 180) -> None:
    """Run `python -m module arguments...` on several ranks that meet through a file, and wait for all.

    Raises AssertionError with the ranks' output when one of them fails or does not end in time; then ends the others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    logs = [folder / f"rank{rank}.log" for rank in range(ranks)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank, log in enumerate(logs):
            environment = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
                "OMP_NUM_THREADS": "1",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MMRL_STORE": str(folder / "store"),
                "MMRL_COLLECTIVE_TIMEOUT_S": str(int(timeout_s)),
            }
            with log.open("wb") as output:
                command = [sys.executable, "-m", module, *arguments]
                processes.append(subprocess.Popen(command, stdout=output, stderr=output, env=environment))
        until = time.monotonic() + timeout_s
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            assert time.monotonic() < until, (
                f"{module} on {ranks} ranks hangs (one rank waits for another)\n{_told(logs)}"
            )
            time.sleep(0.05)
        for process in processes:  # a rank that fails takes the others with it: let them say so
            if process.poll() is None:
                try:
                    process.wait(3)
                except subprocess.TimeoutExpired:
                    process.kill()
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    assert not any(p.returncode for p in processes), f"{module} failed on {ranks} ranks\n{_told(logs)}"


def _told(logs: list[Path]) -> str:
    return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-4000:]}" for log in logs)
