"""What the plugin system costs: a millisecond a step, half a second to list. That nothing of it is called inside the
micro-batch loop is behaviour, and tested in `tests/unit/launch/test_hook_calls.py`."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rig import selected, text_recipe

from mmrl_core.grpo.run import Run
from mmrl_core.launch.observers import RunObservers
from mmrl_core.metrics.names import check_known
from mmrl_core.plugins import load_plugins, resolve
from mmrl_core.recipe import load_recipe
from mmrl_core.testing.tiny import write_recipe_file

LAYER_LIMIT_S = 1e-3
LISTING_LIMIT_S = 0.5
LISTINGS = 9
OBSERVERS = 8

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


def watched(run: Run, count: int) -> RunObservers:
    """Observers of `run`: `count` that do nothing, beside those of installed plugins."""
    many = RunObservers(load_plugins(), [])
    many._observers += [(f"watcher {i}", Watcher()) for i in range(count)]
    return many


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
