"""What a device recommends, merged with what is set, printed for a shell, and given to ranks."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from mmrl_core.errors import PluginError
from mmrl_core.hookspecs import Component, EnvironmentVariable
from mmrl_core.launch.device_environment import additions, as_shell, recommended
from mmrl_core.launch.local import LocalLauncher
from mmrl_core.launch.options import LocalOptions
from mmrl_core.plugins import Found, Plugin, Plugins, load_plugins
from mmrl_core.recipe import Recipe

PLAIN = EnvironmentVariable(name="WIRES", value="7", reason="beads")
LIST = EnvironmentVariable(name="LIBS", value="/lib/a.so", reason="beads", extends=True)


def test_what_is_set_stays_and_lists_get_what_they_lack() -> None:
    assert additions([PLAIN, LIST], {}) == {"WIRES": "7", "LIBS": "/lib/a.so"}
    assert additions([PLAIN, LIST], {"WIRES": "1", "LIBS": "/lib/b.so"}) == {"LIBS": "/lib/b.so:/lib/a.so"}
    assert additions([PLAIN, LIST], {"WIRES": "", "LIBS": "/lib/b.so /lib/a.so"}) == {"WIRES": "7"}


@pytest.mark.parametrize(("before", "after"), [(None, "/lib/a b.so"), ("/lib/b.so", "/lib/b.so:/lib/a b.so")])
def test_a_shell_extends_a_list_with_one_colon(before: str | None, after: str) -> None:
    variable = EnvironmentVariable(name="LIBS", value="/lib/a b.so", reason="x $(reboot)", extends=True)
    environment = {"PATH": os.environ["PATH"], **({} if before is None else {"LIBS": before})}
    script = as_shell([variable, PLAIN]) + '\necho "$LIBS|$WIRES"'
    done = subprocess.run(
        ["sh", "-uc", script], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == f"{after}|7\n"


def found(function: str | None) -> Found:
    component = Component(name="abacus", summary="beads", target="abacus:Abacus", environment=function)
    return Found(kind="device", component=component, distribution="abacus", version="1")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "device": "abacus",
            "run_dir": str(tmp_path / "run"),
            "model": {"path": "m"},
            "sampling": {},
            "data": "arithmetic",
            "rewards": ["numeric"],
            "algorithm": {"steps": 1, "prompts_per_step": 1, "samples_per_prompt": 2},
        }
    )


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the device's function returns, and the arguments it was called with."""
    given: list[Any] = []
    module = types.ModuleType("abacus_environment")

    def wants(recipe: Recipe, *, ranks: int, nodes: int) -> list[Any]:
        return [*given, EnvironmentVariable(name="RANKS_X_NODES", value=f"{ranks}x{nodes}", reason="told")]

    module.wants = wants  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "abacus_environment", module)
    return given


def test_a_device_without_wishes_has_none(recipe: Recipe) -> None:
    assert recommended(found(None), recipe, ranks=2) == []


def test_the_topology_is_passed_on(recipe: Recipe, answer: list[Any]) -> None:
    (variable,) = recommended(found("abacus_environment:wants"), recipe, ranks=4, nodes=2)
    assert variable.value == "4x2"


@pytest.mark.parametrize("wrong", ["WIRES=7", EnvironmentVariable(name="A B; rm", value="1", reason="")])
def test_a_wrong_answer_names_the_plugin(recipe: Recipe, answer: list[Any], wrong: Any) -> None:
    answer.append(wrong)
    with pytest.raises(PluginError, match="device 'abacus' of abacus: abacus_environment:wants returned"):
        recommended(found("abacus_environment:wants"), recipe, ranks=1)


@pytest.mark.parametrize("processes", [1, 2])
def test_ranks_of_the_local_launcher_get_them(
    recipe: Recipe, answer: list[Any], monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """Even a single rank: some libraries read their variables when the process starts."""
    import mmrl_core.launch.ranks

    started: list[dict[str, str]] = []

    def record(executable: str, command: Any, environments: list[dict[str, str]], logs: Any) -> int:
        started.extend(environments)
        return 0

    component = Component(name="abacus", summary="beads", target="a:A", environment="abacus_environment:wants")
    plugin = Plugin(name="a", distribution="abacus", version="1", module="a", components={"device": [component]})
    plugins = Plugins(manager=load_plugins().manager, plugins=[plugin])
    monkeypatch.setattr("mmrl_core.launch.local.load_plugins", lambda: plugins)
    monkeypatch.setattr(mmrl_core.launch.ranks, "run_ranks", record)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("LIBS", "/lib/b.so")
    answer.append(LIST)
    options = LocalOptions(processes=processes, environment="device")
    assert LocalLauncher(options).launch(recipe, "unused") == 0
    assert [e["RANK"] for e in started] == [str(rank) for rank in range(processes)]
    assert all(e["RANKS_X_NODES"] == f"{processes}x1" and e["LIBS"] == "/lib/b.so:/lib/a.so" for e in started)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the variables are glibc's")
def test_what_the_cpu_wants_keeps_freed_memory(recipe: Recipe) -> None:
    """Page faults of making and freeing a large tensor ten times, when the heap has found its size."""
    (cpu,) = (one for one in load_plugins().found("device") if one.name == "cpu")
    wanted = additions(recommended(cpu, recipe, ranks=1), {})
    script = (
        "import resource, torch\n"
        "for _ in range(30): torch.ones(1 << 24)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(10): torch.ones(1 << 24)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    faults = [
        int(
            subprocess.run(
                [sys.executable, "-c", script],
                env={**os.environ, **added},
                capture_output=True,
                text=True,
                check=True,
                timeout=120,
            ).stdout
        )
        for added in ({}, wanted)
    ]
    assert faults[0] > 10 * (1 << 26) / 2**21, "the library kept freed memory by itself"  # huge pages at most
    assert faults[1] < faults[0] / 10
