"""Which combinations there are: what is installed, with reasons for what cannot run."""

from __future__ import annotations

from typing import Any

import pluggy
import pytest

from mmrl_core.errors import PerfError
from mmrl_core.hookspecs import Component, Probe
from mmrl_core.perf.matrix import discover
from mmrl_core.perf.measure import expected_tokens
from mmrl_core.plugins import Plugin, Plugins


def yes() -> Probe:
    return Probe(available=True)


def no() -> Probe:
    return Probe(available=False, reason="no wheels for this machine", cure="pip install wheels")


def component(name: str, **changes: Any) -> Component:
    return Component(name=name, summary="s", target="nowhere:Nothing", **changes)


def plugin(distribution: str, *, error: str | None = None, **components: list[Component]) -> Plugin:
    return Plugin(
        name=distribution,
        distribution=distribution,
        version="1.0",
        module="m",
        error=error,
        components=dict(components),
    )


@pytest.fixture
def plugins() -> Plugins:
    core = plugin(
        "mmrl-core",
        device=[component("cpu")],
        backend=[component("fsdp2")],
        rollout=[
            component("hf", options="mmrl_core.rollouts.options:HfOptions"),
            component("dice", options="mmrl_core.policies.options:TokenSampling"),
        ],
    )
    other = plugin(
        "other",
        backend=[component("toy"), component("never", probe=f"{__name__}:no")],
        rollout=[component("dice", probe=f"{__name__}:yes")],
    )
    broken = plugin("broken", error="Traceback\nImportError: no module named x")
    return Plugins(manager=pluggy.PluginManager("mmrl"), plugins=[core, other, broken])


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or __import__("types").ModuleType(__name__))
    for function in (yes, no):
        monkeypatch.setattr(sys.modules[__name__], function.__name__, function, raising=False)


def test_whatever_is_installed_is_in_it(plugins: Plugins) -> None:
    matrix = discover(plugins, device="cpu", size="tiny", tokens=16)
    names = [c.name for c in matrix.combinations]
    assert "cpu+toy+hf+image" in names
    assert "cpu+fsdp2+other:dice+text" in names, "two distributions declare dice"
    assert len(names) == 2 * 2 * 3
    toy = next(c for c in matrix.combinations if c.name == "cpu+toy+mmrl-core:dice+text")
    assert toy.components == ("mmrl-core 1.0", "other 1.0")


def test_what_cannot_run_has_its_reason(plugins: Plugins) -> None:
    reasons = {u.name: u.reason for u in discover(plugins, device="cpu", size="tiny", tokens=16).unavailable}
    assert reasons["cpu+never+hf+text"] == (
        "backend 'never' (other) cannot run here: no wheels for this machine. Cure: pip install wheels"
    )
    assert reasons["broken 1.0"] == "ImportError: no module named x"
    large = discover(plugins, device="cpu", size="smollm2", tokens=16)
    assert {c.modality for c in large.combinations} == {"text"}
    assert {u.name: u.reason for u in large.unavailable}[
        "cpu+toy+hf+image"
    ] == "there is no image model of size smollm2"


def test_engines_that_can_hold_weights_of_their_own_do(plugins: Plugins) -> None:
    options = {
        c.rollout: c.engine_options for c in discover(plugins, device="cpu", size="tiny", tokens=16).combinations
    }
    assert options == {"hf": (("weights", "own"),), "mmrl-core:dice": (), "other:dice": ()}


def test_patterns_choose(plugins: Plugins) -> None:
    matrix = discover(plugins, device="cpu", size="tiny", tokens=16, only=["*+hf+text", "cpu+never+hf+*"])
    assert {c.name for c in matrix.combinations} == {"cpu+fsdp2+hf+text", "cpu+toy+hf+text"}
    assert {u.name for u in matrix.unavailable} == {"cpu+never+hf+text", "cpu+never+hf+image", "broken 1.0"}
    with pytest.raises(PerfError, match=r"--only 'cpu\+tou\+hf\+text' fits no combination. Did you mean 'cpu\+toy"):
        discover(plugins, device="cpu", size="tiny", tokens=16, only=["cpu+tou+hf+text"])


def test_a_device_must_be_there(plugins: Plugins) -> None:
    plugins.plugins[0].components["device"].append(component("gpu", probe=f"{__name__}:no"))
    with pytest.raises(PerfError, match="device 'gpu' cannot run here: no wheels"):
        discover(plugins, device="gpu", size="tiny", tokens=16)


def test_an_override_of_the_tokens_is_what_is_expected(plugins: Plugins) -> None:
    overrides = ["sampling.max_new_tokens=4", "optimizer.lr=1", "sampling.max_new_tokens=5"]
    assert expected_tokens(discover(plugins, device="cpu", size="tiny", tokens=16, overrides=overrides)) == 5
    assert expected_tokens(discover(plugins, device="cpu", size="tiny", tokens=16)) == 16


def test_a_plugin_authors_backend_appears_by_installing_it(lab: Any) -> None:
    done = lab.mmrl("perf", "run", "--list", "--device", "cpu", "--only", "cpu+toy+*", "--only", "cpu+*+dice+*")
    assert done.returncode == 0, done.stderr
    listed = done.stdout.splitlines()
    assert {"cpu+toy+hf+text", "cpu+toy+dice+image", "cpu+fsdp2+dice+text"} <= set(listed)
