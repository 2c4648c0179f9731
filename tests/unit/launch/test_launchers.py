"""Launchers in one process, torchrun's environment, the preflight's comparisons, logs and stop requests."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from mmrl_core.devices.cpu import CpuDevice
from mmrl_core.errors import DeviceError, PreflightError
from mmrl_core.launch import distributed
from mmrl_core.launch.local import LocalLauncher
from mmrl_core.launch.logs import configure_logging
from mmrl_core.launch.options import LocalOptions, TorchrunOptions
from mmrl_core.launch.preflight import disagreements, installed_versions, preflight
from mmrl_core.launch.signals import StopRequest
from mmrl_core.launch.torchrun import TorchrunLauncher
from mmrl_core.recipe import Choice, Recipe, RewardChoice, load_recipe
from mmrl_core.world import World


@pytest.fixture(autouse=True)
def no_launch_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "MMRL_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("MMRL_COLLECTIVE_TIMEOUT_S", raising=False)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "run_dir": str(tmp_path / "run"),
            "device": "cpu",
            "model": {"path": "some/model"},
            "data": "arithmetic",
            "rewards": ["exact"],
            "algorithm": {"steps": 1, "prompts_per_step": 2, "samples_per_prompt": 2},
        }
    )


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The paths that the worker module `mmrl_test_worker` was called with; it returns 3."""
    calls: list[Path] = []
    module = types.ModuleType("mmrl_test_worker")

    def main(path: Path) -> int:
        calls.append(path)
        assert load_recipe(path)[0].name == "run"
        return 3

    module.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mmrl_test_worker", module)
    return calls


# --------------------------------------------------------------------------------------------------------------- local


@pytest.mark.parametrize("processes", [1, "auto"])
def test_one_process_runs_here(recipe: Recipe, worker: list[Path], processes: Any) -> None:
    status = LocalLauncher(LocalOptions(processes=processes)).launch(recipe, "mmrl_test_worker")
    assert status == 3
    assert worker == [recipe.directory / "recipe.yaml"]
    assert load_recipe(worker[0])[0] == recipe


def test_auto_counts_the_devices_of_the_recipe(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = LocalLauncher(LocalOptions(processes="auto"))

    class Chip(CpuDevice):
        name = "chip"
        count = 8

        def device_count(self) -> int:
            return self.count

    class Found:
        def load(self) -> Any:
            return Chip

    asked: list[Any] = []
    plugins = types.SimpleNamespace(get=lambda kind, word: asked.append((kind, word)) or Found())
    monkeypatch.setattr("mmrl_core.launch.local.load_plugins", lambda: plugins)
    chosen = recipe.model_copy(update={"device": Choice(name="some:chip")})
    assert launcher._process_count(chosen) == 8
    assert asked == [("device", "some:chip")]
    monkeypatch.setattr(Chip, "count", 0)
    with pytest.raises(DeviceError, match="chip"):
        launcher._process_count(chosen)


def test_threads_are_divided_unless_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("mmrl_core.launch.local.usable_cores", lambda: 9)

    def threads(options: LocalOptions) -> str | None:
        return LocalLauncher(options)._environment(0, 4, tmp_path).get("OMP_NUM_THREADS")

    assert threads(LocalOptions(processes=4)) == "2"
    assert threads(LocalOptions(processes=4, threads_per_process=7)) == "7"
    monkeypatch.setattr("mmrl_core.launch.local.usable_cores", lambda: 2)
    assert threads(LocalOptions(processes=4)) == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert threads(LocalOptions(processes=4)) is None


def test_several_ranks_are_not_started_under_another_launcher(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(PreflightError, match=r"2 ranks inside a process .*RANK=1.*launcher: torchrun"):
        LocalLauncher(LocalOptions(processes=2)).launch(recipe)


# ------------------------------------------------------------------------------------------------------------ torchrun


def torchrun_environment(monkeypatch: pytest.MonkeyPatch, **changes: str | None) -> None:
    values = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in {**values, **changes}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")), "RANK, WORLD_SIZE, LOCAL_"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is not a number"),
        ({"RANK": "2"}, "RANK=2 but WORLD_SIZE=2"),
    ],
)
def test_torchrun_says_what_is_missing(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None], said: str
) -> None:
    torchrun_environment(monkeypatch, **changes)
    with pytest.raises(PreflightError) as caught:
        TorchrunLauncher(TorchrunOptions()).launch(recipe)
    assert said in str(caught.value)
    assert "torchrun --nproc-per-node" in str(caught.value)


def test_only_rank_zero_writes_the_run_folder(
    recipe: Recipe, worker: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    torchrun_environment(monkeypatch)
    launcher = TorchrunLauncher(TorchrunOptions())
    assert launcher.launch(recipe, "mmrl_test_worker") == 3
    assert not recipe.directory.exists()
    assert not worker[0].exists(), "the private copy is removed"
    torchrun_environment(monkeypatch, RANK="0", LOCAL_RANK="0")
    assert launcher.launch(recipe, "mmrl_test_worker") == 3
    assert worker[1] == recipe.directory / "recipe.yaml"


# ------------------------------------------------------------------------------------------------------------- connect


def test_world_of_one_has_a_process_group() -> None:
    world = distributed.connect(CpuDevice())
    try:
        assert (world.rank, world.size, world.local_rank, world.nodes) == (0, 1, 0, 1)
        assert dist.get_world_size() == 1
        mesh = dist.init_device_mesh("cpu", (1,))
        import torch

        sharded = distribute_tensor(torch.arange(4.0), mesh, [Shard(0)])
        assert isinstance(sharded, DTensor)
        assert sharded.full_tensor().tolist() == [0, 1, 2, 3]
        with pytest.raises(PreflightError, match="already"):
            distributed.connect(CpuDevice())
    finally:
        distributed.disconnect()
    assert not dist.is_initialized()
    distributed.disconnect()


def test_more_ranks_than_devices(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Chip(CpuDevice):
        name = "chip"

        def device_count(self) -> int:
            return 2

    distributed.check_local_ranks(Chip(), 2)
    with pytest.raises(PreflightError, match=r"4 ranks on .* device chip counts 2"):
        distributed.check_local_ranks(Chip(), 4)
    with caplog.at_level(logging.WARNING, "mmrl"):
        distributed.check_local_ranks(CpuDevice(), 10_000)
    assert "10000 ranks share" in caplog.text


def test_loopback_master_for_several_hosts_is_refused_before_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    torchrun_environment(monkeypatch, MASTER_ADDR="127.0.0.1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(PreflightError, match=r"MASTER_ADDR=127\.0\.0\.1 is a loopback"):
        distributed.connect(CpuDevice())
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.0.1.1", True),
        ("::1", True),
        ("localhost", True),
        ("10.0.0.1", False),
        ("no.invalid", False),
    ],
)
def test_is_loopback(address: str, loopback: bool) -> None:
    assert distributed.is_loopback(address) is loopback


@pytest.mark.parametrize("text", ["0", "-3", "soon", "inf", "nan"])
def test_bad_time_out(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("MMRL_COLLECTIVE_TIMEOUT_S", text)
    with pytest.raises(PreflightError, match="MMRL_COLLECTIVE_TIMEOUT_S"):
        distributed.collective_timeout_s()


# ----------------------------------------------------------------------------------------------------------- preflight


class Gathering(World):
    """A world in which the other ranks answer what rank 0 answers, changed by `others`."""

    others: Any

    def gather(self, value: Any) -> list[Any]:
        return [value, *(change(value) for change in self.others)]


def gathering(nodes: int, *others: Any) -> World:
    world = Gathering(size=1 + len(others), nodes=nodes)
    object.__setattr__(world, "others", others)
    return world


def run_preflight(world: World, rewards: Sequence[RewardChoice] = ()) -> None:
    preflight(
        world, recipe_digest="r", plugins_digest="p", data_digest="d", versions={"torch": "2.13"}, rewards=rewards
    )


def test_preflight_passes_when_all_agree() -> None:
    run_preflight(World())
    run_preflight(gathering(1, lambda v: v))


@pytest.mark.parametrize("field", ["recipe", "plugins", "data", "version of torch"])
def test_preflight_names_field_ranks_and_values(field: str) -> None:
    def differ(value: Any) -> Any:
        return {**value, field: "other"} if isinstance(value, dict) else value

    with pytest.raises(PreflightError) as caught:
        run_preflight(gathering(1, lambda v: v, differ))
    message = str(caught.value)
    assert f"{field} differs between ranks (ranks 0, 1: " in message
    assert "rank 2: other" in message
    assert message.count("differs") == 1


def test_disagreement_with_a_missing_value() -> None:
    (line,) = disagreements([{"version of peft": "1"}, {}])
    assert line.startswith("version of peft differs between ranks (rank 0: 1; rank 1: nothing)")


def test_preflight_refuses_loopback_on_several_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    run_preflight(gathering(1, lambda v: v))
    with pytest.raises(PreflightError, match=r"MASTER_ADDR=127\.0\.0\.1"):
        run_preflight(gathering(2, lambda v: v))


def test_preflight_compares_deadlines_with_the_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = RewardChoice.model_validate({"name": "slow", "deadline_s": 600, "retries": 2})
    with pytest.raises(PreflightError, match=r"reward slow: a batch may take 1800 s .* after 1800 s"):
        run_preflight(World(), [slow])
    monkeypatch.setenv("MMRL_COLLECTIVE_TIMEOUT_S", "1801")
    run_preflight(World(), [slow])
    monkeypatch.setenv("MMRL_COLLECTIVE_TIMEOUT_S", "50")
    with pytest.raises(PreflightError, match="may take 60 s"):
        run_preflight(World(), [RewardChoice(name="quick")])
    run_preflight(World(), [RewardChoice(name="here", run="inline")])


def test_installed_versions() -> None:
    versions = installed_versions()
    assert versions["torch"]
    assert versions["python"] == sys.version.split()[0]


# --------------------------------------------------------------------------------------------------- signals and logs


def test_stop_request_is_a_flag_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert not stop.requested(World())
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested(World())
        assert stop.requested(World())
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_second_interrupt_interrupts() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested(World())
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_stop_request_outside_the_main_thread() -> None:
    answers: list[bool] = []

    def work() -> None:
        with StopRequest() as stop:
            answers.append(stop.requested(World()))
            stop.request()
            answers.append(stop.requested(World()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert answers == [False, True]


def test_stop_is_agreed(caplog: pytest.LogCaptureFixture) -> None:
    class Two(World):
        def maximum(self, value: int) -> int:
            return max(value, signal.SIGTERM)

    with StopRequest() as stop, caplog.at_level(logging.WARNING, "mmrl"):
        assert stop.requested(Two(size=2))
    assert "SIGTERM (another rank)" in caplog.text


def test_logging(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("mmrl.test")
    for start in ("first", "second"):
        configure_logging(tmp_path, 0)
        logger.info("%s start", start)
        logger.warning("%s warning", start)
    written = (tmp_path / "run.log").read_text()
    for words in ("first start", "second start", "WARNING mmrl.test: second warning"):
        assert written.count(words) == 1
    said = capsys.readouterr().err
    assert "start" not in said
    assert said.count("mmrl: WARNING: second warning") == 1
    configure_logging(tmp_path / "other", 3)
    logger.warning("from afar")
    assert "mmrl rank 3: WARNING: from afar" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
