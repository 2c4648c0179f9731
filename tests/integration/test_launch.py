"""Two real ranks on gloo: meeting, disagreeing, dying, being told to stop, being orphaned."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

DRIVER = """
import sys
from mmrl_core.errors import MmrlError
from mmrl_core.launch.failure import report_error
from mmrl_core.launch.local import LocalLauncher
from mmrl_core.launch.options import LocalOptions
from mmrl_core.recipe import Recipe

recipe = Recipe.model_validate({
    "run_dir": "run", "device": "cpu", "model": {"path": "some/model"}, "data": "arithmetic", "rewards": ["exact"],
    "algorithm": {"steps": 1, "prompts_per_step": 2, "samples_per_prompt": 2},
})
try:
    sys.exit(LocalLauncher(LocalOptions(processes=2)).launch(recipe, "rank_work"))
except MmrlError as error:
    sys.exit(report_error(error))
"""

PREAMBLE = """
import os, signal, sys, time
from pathlib import Path
from mmrl_core.devices.cpu import CpuDevice
from mmrl_core.launch.distributed import connect, disconnect
from mmrl_core.launch.preflight import preflight
from mmrl_core.launch.signals import StopRequest
from mmrl_core.recipe import load_recipe

rank = int(os.environ["RANK"])
Path(f"pid{rank}").write_text(str(os.getpid()))
"""


class Launch:
    """A launcher process whose ranks run `rank_work.main`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[str] | None = None

    def start(self, work: str, **environment: str) -> None:
        (self.folder / "rank_work.py").write_text(PREAMBLE + textwrap.dedent(work))
        (self.folder / "driver.py").write_text(DRIVER)
        own = ("MMRL_", "TORCHELASTIC_")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(own) and k not in ("RANK", "WORLD_SIZE")}
        self.process = subprocess.Popen(
            [sys.executable, "driver.py"],
            cwd=self.folder,
            env={
                **clean,
                "PYTHONPATH": str(self.folder),
                "OMP_NUM_THREADS": "1",
                "TMPDIR": str(self.folder),
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self, timeout: float = 90) -> tuple[int, str, str]:
        assert self.process is not None
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err

    def wait_for(self, *names: str, timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while not all((self.folder / name).exists() for name in names):
            assert self.process is not None
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, f"no {names}"
            time.sleep(0.05)

    def pid(self, rank: int) -> int:
        return int((self.folder / f"pid{rank}").read_text())

    def log(self, rank: int) -> str:
        return (self.folder / "run" / "logs" / f"rank{rank}.log").read_text()


def gone(*pids: int, within: float = 10) -> bool:
    """Whether all these processes end (zombies waiting for their parent count as ended)."""

    def alive(pid: int) -> bool:
        try:
            return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False

    deadline = time.monotonic() + within
    while any(alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    made = Launch(tmp_path)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.process.kill()
        made.process.wait()


def test_ranks_meet_and_agree(launch: Launch) -> None:
    (launch.folder / "tmp").mkdir()
    launch.start(
        """
        def main(path):
            recipe, _ = load_recipe(path)
            world = connect(CpuDevice())
            preflight(world, recipe_digest="r", plugins_digest="p", data_digest="d", versions={})
            print("rank", world.rank, "of", world.size, "nodes", world.nodes, "ranks", world.gather(world.rank),
                  "threads", os.environ["OMP_NUM_THREADS"], recipe.name, flush=True)
            with StopRequest() as stop:
                assert not stop.requested(world)
            disconnect()
            return 0
        """,
        TMPDIR=str(launch.folder / "tmp"),
    )
    status, out, err = launch.end()
    assert status == 0, err
    assert "rank 0 of 2 nodes 1 ranks [0, 1] threads 1 run" in out
    assert "rank 1" not in out, "other ranks write to their log"
    assert "rank 1 of 2" in launch.log(1)
    assert err == ""
    assert not list((launch.folder / "tmp").iterdir()), "the meeting point is removed"


def test_preflight_mismatch_is_named_on_both_ranks(launch: Launch) -> None:
    launch.start(
        """
        def main(path):
            world = connect(CpuDevice())
            preflight(world, recipe_digest="r", plugins_digest=f"digest{rank}", data_digest="d", versions={})
            return 0
        """
    )
    status, _, err = launch.end()
    assert status == 1
    said = "plugins differs between ranks (rank 0: digest0; rank 1: digest1)"
    assert said in err.split("mmrl: rank")[0], "rank 0 speaks on the terminal"
    assert said in launch.log(1)
    assert "Traceback" not in err


def test_killed_rank_ends_the_run_quickly_and_is_named(launch: Launch) -> None:
    launch.start(
        """
        def main(path):
            world = connect(CpuDevice())
            print("about to wait", flush=True)
            Path(f"ready{rank}").touch()
            time.sleep(600)
        """
    )
    launch.wait_for("ready0", "ready1")
    pids = launch.pid(0), launch.pid(1)
    os.kill(pids[1], signal.SIGKILL)
    start = time.monotonic()
    status, _, err = launch.end()
    assert time.monotonic() - start < 8
    assert status == 128 + signal.SIGKILL
    assert f"rank 1 of 2 (pid {pids[1]}) was killed by signal 9 (SIGKILL)" in err
    assert "| about to wait" in err
    assert "the other ranks were killed: 0" in err
    assert gone(*pids)


@pytest.mark.parametrize("time_to_leave", [0, 1])
def test_failing_rank_shows_its_traceback(launch: Launch, time_to_leave: int) -> None:
    launch.start(
        """
        def main(path):
            world = connect(CpuDevice())
            try:
                if rank == 1:
                    raise ZeroDivisionError("the reason")
                world.barrier()
            finally:
                disconnect()
                time.sleep(rank * float(os.environ["TIME_TO_LEAVE"]))
            return 0
        """,
        TIME_TO_LEAVE=str(time_to_leave),
    )
    status, _, err = launch.end()
    assert status == 1
    assert "rank 1 of 2" in err
    assert "rank 0 then exited with status 1" in err
    assert "exited with status 1" in err
    assert "ZeroDivisionError: the reason" in err.split("the end of", 1)[1]
    assert gone(launch.pid(0), launch.pid(1))


def test_rank_that_dies_before_meeting_the_others(launch: Launch) -> None:
    launch.start(
        """
        def main(path):
            if rank == 1:
                sys.exit(7)
            connect(CpuDevice())
            return 0
        """
    )
    start = time.monotonic()
    status, _, err = launch.end()
    assert status == 7
    assert time.monotonic() - start < 30
    assert "rank 1 of 2" in err
    assert "exited with status 7" in err
    assert "the other ranks were killed: 0" in err


STEPS = """
def main(path):
    world = connect(CpuDevice())
    with StopRequest() as stop:
        Path(f"ready{rank}").touch()
        while not stop.requested(world):
            time.sleep(0.05)
        time.sleep(0.5)
        Path(f"saved{rank}").touch()
    disconnect()
    return 0
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_the_launcher_lets_all_ranks_save(launch: Launch, number: signal.Signals) -> None:
    launch.start(STEPS)
    launch.wait_for("ready0", "ready1")
    assert launch.process is not None
    launch.process.send_signal(number)
    status, _, err = launch.end()
    assert status == 0, err
    assert (launch.folder / "saved0").exists()
    assert (launch.folder / "saved1").exists()
    assert number.name in err


def test_signal_to_one_rank_stops_all(launch: Launch) -> None:
    launch.start(STEPS)
    launch.wait_for("ready0", "ready1")
    os.kill(launch.pid(1), signal.SIGTERM)
    status, _, err = launch.end()
    assert status == 0, err
    assert (launch.folder / "saved0").exists()


STUBBORN = """
import subprocess

def main(path):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = subprocess.Popen(["sleep", "600"])
    Path(f"child{rank}").write_text(str(child.pid))
    Path(f"ready{rank}").touch()
    time.sleep(600)
"""


def test_second_interrupt_kills(launch: Launch) -> None:
    launch.start(STUBBORN)
    launch.wait_for("ready0", "ready1")
    assert launch.process is not None
    pids = launch.pid(0), launch.pid(1)
    launch.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert not gone(*pids, within=0.5)
    launch.process.send_signal(signal.SIGINT)
    status, _, err = launch.end(timeout=20)
    assert status == 130
    assert "killing the ranks" in err
    children = [int((launch.folder / f"child{rank}").read_text()) for rank in (0, 1)]
    assert gone(*pids, *children), "what a rank has started goes with it"


@pytest.mark.skipif(sys.platform != "linux", reason="the parent's death is noticed at once on Linux")
def test_ranks_do_not_outlive_a_killed_launcher(launch: Launch) -> None:
    launch.start(STUBBORN)
    launch.wait_for("ready0", "ready1")
    assert launch.process is not None
    pids = launch.pid(0), launch.pid(1)
    assert not gone(*pids, within=0.2)
    launch.process.kill()
    launch.process.wait()
    try:
        assert gone(*pids, within=5)
    finally:
        for rank in (0, 1):
            os.kill(int((launch.folder / f"child{rank}").read_text()), signal.SIGKILL)


def test_rank_started_by_a_parent_that_is_gone_dies(tmp_path: Path) -> None:
    code = "from mmrl_core.launch.parent import die_with_parent; die_with_parent(); print('alive')"
    run: Callable[[str], Any] = lambda pid: subprocess.run(  # noqa: E731
        [sys.executable, "-c", code], env={**os.environ, "MMRL_PARENT_PID": pid}, capture_output=True, text=True
    )
    assert run(str(os.getpid())).stdout == "alive\n"
    assert run("1").returncode == -signal.SIGKILL
    assert run("").stdout == "alive\n"


def test_under_torchrun(launch: Launch) -> None:
    work = """
    def main(path):
        world = connect(CpuDevice())
        said = f"rank {world.rank} of {world.size} nodes {world.nodes} reads {path}"
        Path(f"said{rank}").write_text(said)
        disconnect()
        return 0
    """
    (launch.folder / "rank_work.py").write_text(PREAMBLE + textwrap.dedent(work))
    driver = DRIVER.replace("local import LocalLauncher", "torchrun import TorchrunLauncher as LocalLauncher")
    driver = driver.replace("import LocalOptions", "import TorchrunOptions").replace(
        "LocalOptions(processes=2)", "None"
    )
    (launch.folder / "driver.py").write_text(driver)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "driver.py"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MMRL_") and k != "RANK"}
    environment = {**clean, "PYTHONPATH": str(launch.folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=launch.folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (launch.folder / "said0").read_text() == "rank 0 of 2 nodes 1 reads run/recipe.yaml"
    other = (launch.folder / "said1").read_text()
    assert other.startswith("rank 1 of 2 nodes 1 reads ")
    assert "run/recipe.yaml" not in other, "only rank 0 writes the run folder"


def test_logs_of_an_earlier_run_are_kept_but_not_shown(launch: Launch) -> None:
    logs = launch.folder / "run" / "logs"
    logs.mkdir(parents=True)
    (logs / "rank1.log").write_text("from the day before\n")
    launch.start("def main(path):\n    print('today', flush=True)\n    return 3 * rank\n")
    status, _, err = launch.end()
    assert status == 3
    assert launch.log(1).startswith("from the day before\n")
    assert "| today" in err
    assert "day before" not in err
