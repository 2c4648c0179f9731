"""No hook and no plugin lookup happens inside a step: the plugin layer costs the same however a step is cut up."""

from __future__ import annotations

import importlib.metadata
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mmrl_core import hookspecs, plugin_checks, plugins
from mmrl_core.grpo.distribute import Layouts
from mmrl_core.grpo.run import Run
from mmrl_core.grpo.trainer import hand_over_weights, train_step
from mmrl_core.launch import components, observers
from mmrl_core.launch.distributed import connect, disconnect
from mmrl_core.launch.observers import RunObservers
from mmrl_core.launch.worker import build
from mmrl_core.plugins import load_plugins, resolve
from mmrl_core.recipe import load_recipe
from mmrl_core.testing.tiny import tiny_language_model, tiny_recipe, write_recipe_file

LAYER = (
    *(str(Path(module.__file__ or "").resolve()) for module in (plugins, plugin_checks, hookspecs, observers)),
    str(Path(importlib.metadata.__file__).resolve().parent),
)
"""Source files of the plugin layer. Not pluggy's own, which pytest uses too: our manager's calls are monitored."""


class Watcher:
    """Counts the steps it is told of."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def mmrl_step_end(self, step: int) -> None:
        self.steps.append(step)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_language_model(tmp_path_factory.mktemp("model") / "tiny")


@contextmanager
def running(model: Path, folder: Path, groups: int, watcher: Watcher) -> Iterator[tuple[Run, list[int]]]:
    """A run with 4 groups a step in micro-batches of `groups`, and a list that grows by one a replay."""
    values = tiny_recipe(
        model,
        folder / "run",
        backend={"micro_batch_groups": groups},
        algorithm={"prompts_per_step": 4},
        writers=[],
    )
    recipe, source = load_recipe(write_recipe_file(folder / "recipe.json", values))
    selection = resolve(recipe, source)
    device = components.create_device(selection)
    with components.create_rewards(recipe, selection, device, 0) as rewards:
        world = connect(device)
        try:
            run = build(recipe, selection, world, device, rewards)
            told = RunObservers(load_plugins(), [])
            told._observers.append(("watcher", watcher))
            run.observers = told
            hand_over_weights(run)
            replays: list[int] = []
            original = run.policy.replay

            def replay(*arguments: Any, **named: Any) -> Any:
                replays.append(1)
                return original(*arguments, **named)

            run.policy.replay = replay  # type: ignore[method-assign]
            yield run, replays
        finally:
            disconnect()


@contextmanager
def layer_calls() -> Iterator[list[str]]:
    """Calls into the plugin layer, of functions named like a hook, and of hooks through the manager."""
    calls: list[str] = []

    def before(name: str, implementations: Any, arguments: Any) -> None:
        calls.append(f"manager:{name}")

    def after(outcome: Any, name: str, implementations: Any, arguments: Any) -> None: ...

    def profile(frame: Any, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and (code.co_filename.startswith(LAYER) or code.co_name.startswith("mmrl_")):
            calls.append(f"{Path(code.co_filename).name}:{code.co_name}")

    undo = load_plugins().manager.add_hookcall_monitoring(before, after)
    previous = sys.getprofile()
    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        yield calls
    finally:
        sys.setprofile(previous)
        threading.setprofile(previous)  # type: ignore[arg-type]
        undo()


def one_step(run: Run) -> tuple[list[str], list[str]]:
    """Calls within a step, and those of telling observers about it."""
    layouts = Layouts.gather(run.world, run.engine.replica, run.backend.replica)
    with layer_calls() as within:
        learned, batch = train_step(run, 1, layouts)
    with layer_calls() as told:
        run.observers.step_end(1, learned, batch.samples)
    return within, told


def test_hook_calls_of_a_step_do_not_depend_on_its_micro_batches(model: Path, tmp_path: Path) -> None:
    told_by_count: dict[int, list[str]] = {}
    for groups in (4, 2, 1):
        watcher = Watcher()
        with running(model, tmp_path / str(groups), groups, watcher) as (run, replays):
            within, told = one_step(run)
        assert within == []
        assert watcher.steps == [1]
        told_by_count[len(replays)] = told
    assert sorted(told_by_count) == [1, 2, 4], "the step did not run in the micro-batches it was told to"
    assert told_by_count[1] == told_by_count[2] == told_by_count[4]
    assert sum(call.endswith(":mmrl_step_end") for call in told_by_count[1]) == 1


@pytest.mark.parametrize("way", ["manager", "direct", "lookup"])
def test_a_call_within_the_loop_would_be_seen(model: Path, tmp_path: Path, way: str) -> None:
    manager, found = load_plugins().manager, load_plugins()
    chatter = {
        "manager": lambda: manager.hook.mmrl_step_end(step=1, metrics={}, samples=[]),
        "direct": lambda: Watcher().mmrl_step_end(1),
        "lookup": lambda: found.get("reward", "numeric"),
    }[way]
    with running(model, tmp_path, 1, Watcher()) as (run, _):
        original = run.policy.replay

        def chatty(*arguments: Any, **named: Any) -> Any:
            chatter()
            return original(*arguments, **named)

        run.policy.replay = chatty  # type: ignore[method-assign]
        within, _ = one_step(run)
    assert len(within) >= 4
