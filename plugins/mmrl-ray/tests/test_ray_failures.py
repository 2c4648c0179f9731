"""What users get when something is missing or dies: at once, with names and numbers; and nothing stays behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import ray
from kill_moments import start
from mmrl_ray import address as joining
from mmrl_ray.address import reach
from mmrl_ray.cluster import Node
from mmrl_ray.launcher import RayLauncher
from mmrl_ray.options import RayOptions
from mmrl_ray.outcome import first, of_actor, of_exit
from mmrl_ray.placement import Place
from ray_nodes import RayNode, ours, wait_for_nodes

from mmrl_core.errors import PreflightError
from mmrl_core.testing.tiny import write_recipe_file

LIMIT_S = 180
PREAMBLE = """
import os, signal, sys, time
from pathlib import Path

rank = int(os.environ["RANK"])
Path(f"pid{rank}").write_text(str(os.getpid()))
"""
SAVES = """
told = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda n, _: told.append(n))
Path(f"ready{rank}").touch()
while not told:
    time.sleep(0.05)
Path(f"saved{rank}").write_text(signal.Signals(told[0]).name)
print("rank", rank, "saved", flush=True)
return 0
"""


class Work:
    """A folder whose `rank_work.main` runs on ranks; launched from this process or from another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, body: str) -> None:
        text = PREAMBLE + "\n\ndef main(path):\n" + textwrap.indent(textwrap.dedent(body).strip("\n"), "    ") + "\n"
        (self.folder / "rank_work.py").write_text(text)

    def start(self, device: str = "cpu", patch: str = "", **launcher: Any) -> subprocess.Popen[str]:
        recipe = {
            "run_dir": "run",
            "device": device,
            "launcher": {"name": "ray", **launcher},
            "model": {"path": "some/model"},
            "data": "arithmetic",
            "rewards": ["exact"],
            "algorithm": {"steps": 1, "prompts_per_step": 2, "samples_per_prompt": 2},
        }
        return start(write_recipe_file(self.folder / "recipe.yaml", recipe), "rank_work", self.folder, patch)

    def launch(self, device: str = "cpu", patch: str = "", **launcher: Any) -> tuple[int, str, str]:
        """(exit status, stdout, stderr)"""
        process = self.start(device, patch, **launcher)
        out, err = process.communicate(timeout=LIMIT_S)
        return process.returncode, out, err

    def wait_for(self, *names: str, process: subprocess.Popen[str] | None = None) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not all((self.folder / name).exists() for name in names):
            assert process is None or process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, f"no {names}"
            time.sleep(0.05)


@pytest.fixture
def work(tmp_path: Path) -> Work:
    made = Work(tmp_path)
    made.write("return 0")
    return made


# ------------------------------------------------------------------------------------------------------ no such cluster


def test_nobody_at_the_address() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"  # bound, and not listened on
        start = time.monotonic()
        with pytest.raises(PreflightError, match=rf"no Ray cluster at {address}: .*refused.*ray start --head"):
            reach(address)
        with pytest.raises(PreflightError, match=rf"no Ray cluster at ray://{address}"):
            reach(f"ray://{address}")
        assert time.monotonic() - start < 5
    with pytest.raises(PreflightError, match=r"no Ray cluster at no-such-host.invalid:6379"):
        reach("no-such-host.invalid:6379")


def test_somebody_else_at_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "_ANSWER_S", 3.0)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(PreflightError, match=f"something listens at {address}, but does not answer"):
            reach(address)


@pytest.mark.parametrize("address", ["head", "head:port", "ray://"])
def test_no_address(address: str) -> None:
    with pytest.raises(PreflightError, match="is no address of a cluster"):
        reach(address)


def test_a_machine_without_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(PreflightError, match="this machine belongs to no Ray cluster"):
        reach("auto")


def test_another_token(head: RayNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 64)
    with pytest.raises(PreflightError, match=f"{head.address} does not take this process: its authentication token"):
        reach(head.address)


def test_a_bad_address_ends_the_command(work: Work) -> None:
    status, out, err = work.launch(address="127.0.0.1:1")
    assert (status, out) == (1, "")
    assert err.startswith("mmrl: launcher ray: no Ray cluster at 127.0.0.1:1: ")
    assert "Traceback" not in err
    assert not (work.folder / "run").exists()


def test_inside_another_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(PreflightError, match="another launcher has started"):
        RayLauncher(RayOptions()).launch(cast(Any, None))


# ------------------------------------------------------------------------------------------------------ too few devices


@pytest.mark.parametrize(
    ("device", "options", "said"),
    [
        ("cpu", {"processes": 9}, r"9 ranks need 9 CPU, and the Ray cluster .* has 4: .*holds 4 of them"),
        ("cuda", {"processes": 2}, r"2 ranks need 2 GPU, and the Ray cluster .* has 0: .*holds none of them"),
    ],
)
def test_fewer_devices_than_ranks(work: Work, cluster: str, device: str, options: dict[str, Any], said: str) -> None:
    status, _, err = work.launch(device, address=cluster, **options)
    assert status == 1
    assert re.search(said, err), err


def test_devices_that_somebody_holds(work: Work, cluster: str) -> None:
    code = (
        "import sys, ray, time; ray.init(address=sys.argv[1], log_to_driver=False, logging_level=40)\n"
        "g = ray.util.placement_group([{'CPU': 1}] * 3); ray.get(g.ready()); print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, cluster], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        patch = (
            "from mmrl_ray import address; address._use_token(); from mmrl_ray import placement as p; p._SETTLE_S=1.0"
        )
        status, _, err = work.launch(patch=patch, address=cluster, processes=2)
        assert status == 1
        assert re.search(r"2 ranks need 2 CPU, and of those .* only 1 CPU are free", err), err
    finally:
        holder.kill()
        holder.communicate()


# ----------------------------------------------------------------------------------------------------- nodes not alike


def test_a_node_that_differs_is_named(work: Work, head: RayNode, tmp_path: Path) -> None:
    """Another mmrl, and a run folder that only this node sees: as with a disk that is not shared."""
    info = tmp_path / "shadow" / "mmrl_core-0.0.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mmrl-core\nVersion: 0.0.9\n")
    (work.folder / "run").mkdir()
    private = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {work.folder / "run"} && exec "$@"', "sh"]
    if subprocess.run([*private, "true"], capture_output=True, check=False).returncode != 0:
        private = []  # not allowed to here
    work.write("Path('started').touch()\nreturn 0")
    environment = {"PYTHONPATH": str(tmp_path / "shadow")}
    odd = RayNode(cpus=1, join=head.address, resources='{"odd": 1}', environment=environment, before=private)
    try:
        status, _, err = work.launch(address=head.address, processes=1, resource="odd")
        assert status == 1
        assert "launcher ray: the nodes are not alike" in err
        assert "mmrl-core 0.0.9 there" in err
        assert not private or "the run folder run is not the one that this process writes" in err
        assert not (work.folder / "started").exists()
    finally:
        odd.stop()


# ------------------------------------------------------------------------------------------------------- ranks that die


def test_a_rank_that_fails_is_not_started_again(work: Work, cluster: str) -> None:
    work.write("""
        print("at work", rank, flush=True)
        if rank == 1:
            time.sleep(0.5)
            raise ZeroDivisionError("the reason")
        time.sleep(600)
    """)
    status, out, err = work.launch(address=cluster, processes=2)
    assert status == 1
    assert out == "at work 0\n"
    assert "rank 1 of 2 (pid " in err
    assert "exited with status 1" in err
    assert "ZeroDivisionError: the reason" in err.split("the end of", 1)[1]
    assert "the other ranks were killed: 0" in err
    assert "restart" not in err
    assert not psutil.pid_exists(int((work.folder / "pid0").read_text()))


def test_restarts_are_bounded(work: Work, cluster: str) -> None:
    """A rank that is killed; after it an actor that is."""
    work.write("""
        with open("starts", "a") as file:
            file.write(f"{rank}")
        if rank == 0:
            time.sleep(0.5)
            os.kill(os.getppid() if Path("again").exists() else os.getpid(), Path("again").touch() or signal.SIGKILL)
        time.sleep(600)
    """)
    status, _, err = work.launch(address=cluster, processes=2, max_restarts=1)
    assert status == 128 + signal.SIGKILL
    first, _, then = err.partition("restart 1 of 1")
    assert "was killed by signal 9 (SIGKILL)" in first
    assert "was lost with its actor" in then
    assert "the ranks have been restarted 1 times already (launcher.max_restarts)" in then
    assert "restart 1 of 1" in (work.folder / "run" / "run.log").read_text()
    assert sorted((work.folder / "starts").read_text()) == list("0011")
    for rank in (0, 1):
        assert not psutil.pid_exists(int((work.folder / f"pid{rank}").read_text())), "a rank dies with its actor"


def test_killed_for_memory(work: Work, head: RayNode) -> None:
    """A node whose limit is so low that Ray kills whatever runs there."""
    work.write("time.sleep(600)")
    # the check of the nodes would be the first victim
    patch = "from mmrl_ray import address; address._use_token(); from mmrl_ray import job; job.check_nodes = print"
    low = {"RAY_memory_usage_threshold": "0.0001", "RAY_memory_monitor_refresh_ms": "1500"}
    small = RayNode(cpus=1, join=head.address, resources='{"small": 1}', environment=low)
    try:
        status, _, err = work.launch(patch=patch, address=head.address, processes=1, resource="small", max_restarts=0)
        assert status == 137, err
        assert "rank 0 of 1" in err
        assert "was killed by Ray for want of memory: the node was running low" in err
        assert "RAY_memory_usage_threshold" in err
    finally:
        small.stop()


def test_causes() -> None:
    """The kernel's killer; a crash; one that other ranks have noticed before us."""
    node = Node(id="n", address="10.0.0.2", resources={}, alive=True)
    places = [Place(rank=rank, node=node, local_rank=rank, local_size=2, bundle=rank) for rank in (0, 1)]
    killed = of_exit(places[0], 42, -signal.SIGKILL, 100.0, out_of_memory=True)
    assert killed.hint is not None
    assert "The kernel has killed for want of memory on that node" in killed.hint
    error = of_exit(places[1], 43, 1, 99.999, out_of_memory=False)
    assert first([error, killed]) is killed
    crashed = of_exit(places[0], 42, -signal.SIGSEGV, 100.0, out_of_memory=True)
    assert (crashed.how, crashed.hint) == ("(pid 42 on node 10.0.0.2) was killed by signal 11 (SIGSEGV)", None)
    assert first([error, crashed]) is crashed
    aborted = of_exit(places[0], 42, -signal.SIGABRT, 110.0, out_of_memory=False)
    assert first([error, aborted]) is error, "an abort that follows another rank's error long after"
    said = ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory.")
    assert "for want of memory" in of_actor(places[0], said, 0.0).how


def test_breakpoints_wait_for_rays_debugger(work: Work, cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_DEBUG", "legacy")
    work.write("""
        answer = 41
        breakpoint()
        answer += 1
        print("answer", answer, flush=True)
        return 0
    """)
    process = work.start(address=cluster, processes=1)
    assert process.stderr is not None
    said = ""
    while (found := re.search(r"session open at localhost:(\d+)", said)) is None:
        line = process.stderr.readline()
        assert line, said
        said += line
    with socket.create_connection(("127.0.0.1", int(found[1])), timeout=LIMIT_S) as debugger:
        talk = debugger.makefile("rw")
        talk.write("p answer * 1000\nanswer = 1\nc\n")
        talk.flush()
        shown = talk.read()
    assert "rank_work.py" in shown, "it stops in the rank's own code"
    assert "41000" in shown
    out, err = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, out) == (0, "answer 2\n"), err


# ------------------------------------------------------------------------------------------------------------- stopping


def test_sigterm_lets_ranks_save(work: Work, cluster: str) -> None:
    work.write(SAVES)
    process = work.start(address=cluster, processes=2)
    work.wait_for("ready0", "ready1", process=process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, err
    assert "mmrl: SIGTERM: telling 2 ranks to save and stop" in err
    assert [(work.folder / f"saved{rank}").read_text() for rank in (0, 1)] == ["SIGTERM"] * 2
    assert out == "rank 0 saved\n"
    assert "rank 1 saved" in (work.folder / "run" / "logs" / "rank1.log").read_text()


def test_through_the_client_server(work: Work, head: RayNode, cluster: str) -> None:
    """A driver that is no part of the cluster: output, signals, and nothing left."""
    work.write(SAVES)
    address = f"ray://{head.address.rpartition(':')[0]}:{head.client_port}"
    for _ in range(3):  # Ray allows its server half a minute to start, however busy the machine is
        process = work.start(address=address, processes=2)
        while process.poll() is None and not (work.folder / "ready0").exists():
            time.sleep(0.1)
        if process.returncode is None or "cannot join the cluster" not in process.communicate()[1]:
            break
    work.wait_for("ready0", "ready1", process=process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, out) == (0, "rank 0 saved\n"), err
    assert (work.folder / "saved1").read_text() == "SIGINT"


def test_interrupted_twice(work: Work, cluster: str) -> None:
    work.write("signal.signal(signal.SIGINT, lambda *_: None)\nPath(f'ready{rank}').touch()\ntime.sleep(600)")
    process = work.start(address=cluster, processes=2)
    work.wait_for("ready0", "ready1", process=process)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 128 + signal.SIGINT, err
    assert "interrupted again; killing the ranks" in err


def test_a_killed_launcher_takes_its_ranks_along(work: Work, cluster: str) -> None:
    work.write(SAVES)
    process = work.start(address=cluster, processes=2)
    work.wait_for("ready0", "ready1", process=process)
    ranks = [psutil.Process(int((work.folder / f"pid{rank}").read_text())) for rank in (0, 1)]
    process.kill()
    process.communicate()
    assert not psutil.wait_procs(ranks, timeout=LIMIT_S)[1]
    assert not (work.folder / "saved0").exists()


@pytest.mark.parametrize("end", ["interrupted", "killed"])
def test_nothing_stays_of_a_cluster_that_was_started_here(work: Work, end: str) -> None:
    """Ctrl-C reaches every process of the terminal's group, Ray's too; kill -9 only this one."""
    before = {process.pid for process in ours()}
    work.write(SAVES)
    process = work.start(processes=2)
    work.wait_for("ready0", "ready1", process=process)
    assert len({p.pid for p in ours()} - before) > 6, "ranks, actors, raylet, and so on"
    if end == "killed":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=LIMIT_S)
    if end == "interrupted":
        assert process.returncode == 0, err
        assert (work.folder / "saved1").read_text() == "SIGINT"
        assert out == "rank 0 saved\n"
    _, left = psutil.wait_procs([p for p in ours() if p.pid not in before], timeout=60)
    assert not left


def test_the_cluster_is_as_it_was(head: RayNode, cluster: str) -> None:
    """After all of that: both nodes alive, every CPU free, no actor, no rank."""
    wait_for_nodes(head.address, 2)
    code = (
        "import sys, ray, time; ray.init(address=sys.argv[1], log_to_driver=False, logging_level=40)\n"
        "deadline = time.time() + 20\n"
        "while ray.available_resources().get('CPU') != 4.0 and time.time() < deadline: time.sleep(0.2)\n"
        "print(ray.available_resources().get('CPU'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, cluster], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout == "4.0\n"
    assert not [p for p in ours() if "mmrl_core.launch.rank" in p.cmdline()]
