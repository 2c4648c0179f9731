"""What the plugin system costs: no call inside the micro-batch loop, a millisecond a step, half a second to list."""

from __future__ import annotations

import importlib.metadata
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rig import selected, text_recipe

from mmrl_core import hookspecs, plugin_checks, plugins
from mmrl_core.grpo.distribute import Layouts
from mmrl_core.grpo.run import Run
from mmrl_core.grpo.trainer import train_step
from mmrl_core.launch import observers
from mmrl_core.launch.observers import RunObservers
from mmrl_core.metrics.names import check_known
from mmrl_core.plugins import load_plugins, resolve
from mmrl_core.recipe import load_recipe
from mmrl_core.testing.tiny import write_recipe_file

LAYER_LIMIT_S = 1e-3
LISTING_LIMIT_S = 0.5
LISTINGS = 9
OBSERVERS = 8

LAYER = (
    *(str(Path(module.__file__ or "").resolve()) for module in (plugins, plugin_checks, hookspecs, observers)),
    str(Path(importlib.metadata.__file__).resolve().parent),
)
"""Source files of the plugin layer. pluggy itself is left out, for pytest uses it too: calls through *our* manager
are counted by its own monitoring."""

NO_TORCH = """
import sys
from mmrl_core.cli.main import main
status = main(["plugins"])
heavy = sorted({"torch", "transformers", "numpy", "tensorboard", "matplotlib"} & set(sys.modules))
print(f"imported: {' '.join(heavy)}", file=sys.stderr)
sys.exit(status or (3 if heavy else 0))
"""


class Watcher:
    """An observer that does nothing: what remains is the layer."""

    def mmrl_run_start(self, recipe: Any, run_dir: str, first_step: int) -> None: ...
    def mmrl_step_end(self, step: int, metrics: Any, samples: Any) -> None: ...
    def mmrl_run_end(self, summary: Any) -> None: ...


@contextmanager
def layer_calls() -> Iterator[list[str]]:
    """Every Python call into the plugin layer, of a hook implementation, or of a hook through the manager, while the
    block runs; threads that it starts are watched too."""
    calls: list[str] = []

    def before(name: str, implementations: Any, arguments: Any) -> None:
        calls.append(f"manager:{name}")

    def after(outcome: Any, name: str, implementations: Any, arguments: Any) -> None: ...

    def profile(frame: Any, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and (code.co_filename.startswith(LAYER) or code.co_name.startswith("mmrl_")):
            calls.append(f"{Path(code.co_filename).name}:{code.co_name}")

    undo = load_plugins().manager.add_hookcall_monitoring(before, after)
    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        yield calls
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
        undo()


def watched(run: Run, count: int) -> RunObservers:
    """Observers of `run`: `count` that do nothing, beside those of installed plugins."""
    many = RunObservers(load_plugins(), [])
    many._observers += [(f"watcher {i}", Watcher()) for i in range(count)]
    return many


def test_hook_calls_do_not_grow_with_micro_batches(bench: Any) -> None:
    """Not timed: calls are counted. The same step in 1, 2 and 4 micro-batches."""
    seen: dict[int, tuple[int, list[str]]] = {}
    for groups in (4, 2, 1):
        run = bench.run(micro_batch_groups=groups)
        run.observers = watched(run, 1)
        layouts = Layouts.gather(run.world, run.engine.replica, run.backend.replica)
        replays = 0
        original = run.policy.replay

        def counting(*arguments: Any, original: Any = original, **named: Any) -> Any:
            nonlocal replays
            replays += 1
            return original(*arguments, **named)

        run.policy.replay = counting
        with layer_calls() as in_step:
            learned, batch = train_step(run, 1, layouts)
        with layer_calls() as after_step:
            run.observers.step_end(1, learned, batch.samples)
        run.policy.replay = original
        assert in_step == [], "the plugin layer was called within a step"
        seen[replays] = (len(after_step), after_step)
    assert sorted(seen) == [1, 2, 4], "the step did not run in the micro-batches it was told to"
    counts = {count for count, _ in seen.values()}
    assert len(counts) == 1
    assert counts.pop() > 0, "the counter sees nothing"
    assert sum(name.endswith(":mmrl_step_end") for name in seen[4][1]) == 1


def test_layer_per_step(row: Callable[..., float], bench: Any, tmp_path: Path) -> None:
    """What the layer adds to a step, as an upper bound: telling 8 observers, *and* finding every component that the
    recipe names (which a run does once, before its first step)."""
    bench.close()
    with selected(text_recipe(bench.model(), tmp_path), tmp_path) as (run, selection):
        found = [(s.found.kind, f"{s.found.distribution}:{s.found.name}") for s in selection.all()]
        table = load_plugins()
        many = watched(run, OBSERVERS)
        metrics = {f"grpo/score/{kind}": 0.5 for kind in ("mean", "max", "min")}
        check_known(metrics)

        def layer() -> None:
            many.step_end(1, metrics, [])
            for kind, word in found:
                table.get(kind, word)

        median = row(layer, count=50, iterations=20, observers=OBSERVERS, components=len(found), limit_s=LAYER_LIMIT_S)
    assert not median > LAYER_LIMIT_S, f"the plugin layer takes {1e3 * median:.2f} ms a step"


def test_recipe_resolution(row: Callable[..., float], tmp_path: Path) -> None:
    """Once a run: finding and checking everything a recipe names, plugins loaded already. No limit."""
    path = write_recipe_file(tmp_path / "recipe.json", text_recipe("no/model", tmp_path))

    def whole() -> None:
        recipe, source = load_recipe(path)
        resolve(recipe, source)

    row(whole, count=10)


def test_listing_plugins(benchmark: Any, provenance: dict[str, Any]) -> None:
    """`mmrl plugins`, a fresh process each time."""
    command = [sys.executable, "-c", NO_TORCH]
    seconds: list[float] = []

    def listing() -> None:
        begin = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        seconds.append(time.perf_counter() - begin)
        assert done.returncode == 0, done.stderr
        assert "fsdp2" in done.stdout

    benchmark.pedantic(listing, rounds=LISTINGS, warmup_rounds=1, iterations=1)
    median = statistics.median(seconds[1:] or seconds)
    benchmark.extra_info.update(provenance, limit_s=LISTING_LIMIT_S)
    assert median <= LISTING_LIMIT_S, f"mmrl plugins takes {median:.2f} s"


@pytest.mark.parametrize("way", ["manager", "direct"])
def test_the_counter_sees_a_call_in_the_loop(bench: Any, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """The proof that the count above can fail: a hook called for each micro-batch is seen."""
    run = bench.run(micro_batch_groups=1)
    layouts = Layouts.gather(run.world, run.engine.replica, run.backend.replica)
    original = run.policy.replay
    manager = load_plugins().manager

    def chatty(*arguments: Any, **named: Any) -> Any:
        if way == "manager":
            manager.hook.mmrl_step_end(step=1, metrics={}, samples=[])
        else:
            Watcher().mmrl_step_end(1, {}, [])
        return original(*arguments, **named)

    monkeypatch.setattr(run.policy, "replay", chatty)
    with layer_calls() as calls:
        train_step(run, 1, layouts)
    assert len(calls) == 4
