"""Rewards in workers: what goes wrong in one never reaches the trainer as a number, and leaves no process behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from mmrl_core.contracts import Prompt, Sample
from mmrl_core.errors import RewardError
from mmrl_core.hookspecs import Component
from mmrl_core.plugins import Found, Selected
from mmrl_core.recipe import RewardChoice
from mmrl_core.rewards.executor import RewardExecutor, Scored

REWARDS = r'''
"""Rewards that misbehave on demand: the sample's text says how."""
import ctypes, os, signal, subprocess, sys, time
from pathlib import Path
from mmrl_core import Reward, RewardResult, reward
from mmrl_core.recipe import Spec

DAEMON = """
import os, time
pid = os.fork()
if pid:
    print(pid, flush=True)
    os._exit(0)
os.setsid()
os.close(1)
os.close(2)
time.sleep(600)
"""


class Options(Spec):
    note: str
    """Where the reward leaves traces of what it did."""
    child: bool = False
    """Start a process that outlives everything, in a session of its own."""
    busy: bool = False
    """Hang in C code that never lets another thread run."""


class Misbehaves(Reward):
    batch_size = 4

    def setup(self, device):
        self.leave("pid", os.getpid())
        self.leave("device", device)
        if device == "broken" or os.path.exists(self.options.note + ".broken"):
            raise ValueError("no weights here")
        if device == "slow":
            time.sleep(600)
        if device == "dies":
            os._exit(4)

    def leave(self, what, value):
        with open(self.options.note, "a") as f:
            f.write(f"{what} {value}\n")

    def score(self, samples):
        word = samples[0].text
        self.leave("batch", f"{len(samples)} {word}")
        if word == "raise":
            raise KeyError("told to")
        if word == "hang":
            if self.options.child:
                plain = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
                daemon = subprocess.run([sys.executable, "-c", DAEMON], capture_output=True, text=True, check=True)
                self.leave("pid", plain.pid)
                self.leave("pid", daemon.stdout.strip())
            self.leave("hanging", 1)
            if self.options.busy:
                ctypes.PyDLL(None).sleep(600)  # PyDLL keeps the interpreter's lock
            time.sleep(600)
        if word == "exit":
            os._exit(3)
        if word == "exit-for-good":
            Path(self.options.note + ".broken").touch()
            os._exit(3)
        if word == "sysexit":
            sys.exit(7)
        if word == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if word == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "count":
            return [RewardResult(value=1.0)] * (len(samples) + 1)
        if word == "type":
            return [0.5 for _ in samples]
        if word == "generator":
            return (RewardResult(value=1.0) for _ in samples)
        if word == "both":
            return [RewardResult(value=1.0, failure="x") for _ in samples]
        if word == "string":
            return [RewardResult(value="1.0") for _ in samples]
        if word == "flaky":
            marker = Path(self.options.note + ".tried")
            if not marker.exists():
                marker.touch()
                raise OSError("first time")
        return [self.one(s) for s in samples]

    def one(self, sample):
        if sample.text == "nan":
            return RewardResult(value=float("nan"))
        if sample.text == "inf":
            return RewardResult(value=float("inf"))
        if sample.text == "nan-sub":
            return RewardResult(value=1.0, scores={"part": float("nan")})
        if sample.text == "fail":
            return RewardResult(failure="cannot say")
        if sample.text == "image":
            return RewardResult(value=float(sample.image.mean()))
        return RewardResult(value=2.0, scores={"half": 1.0})


@reward
def environment(sample):
    """Fails with what it sees, so that the test can read it."""
    import json, threading
    print("printed by a reward")
    seen = {
        "env": dict(os.environ),
        "stdin": os.read(0, 1).decode(),
        "main": threading.current_thread() is threading.main_thread(),
        "torch": "torch" in sys.modules,
        "session": os.getsid(0) == os.getppid(),
    }
    return RewardResult(failure=json.dumps(seen))


@reward
def slow(sample):
    time.sleep(0.5)
    return 1.0
'''


@pytest.fixture(scope="module")
def module_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("rewards")
    (directory / "misbehaving.py").write_text(REWARDS)
    sys.path.insert(0, str(directory))  # workers import what their trainer can import
    yield directory
    sys.path.remove(str(directory))


@pytest.fixture
def note(tmp_path: Path, module_directory: Path) -> Path:
    path = tmp_path / "note"
    path.touch()
    return path


@pytest.fixture(autouse=True)
def _leaves_no_process(request: pytest.FixtureRequest) -> Iterator[None]:
    before = set(psutil.Process().children(recursive=True))
    yield
    left = [p for p in psutil.Process().children(recursive=True) if p not in before]
    assert left == []


def selected(note: Path, target: str = "Misbehaves", **options: Any) -> Selected:
    if target != "Misbehaves":
        component = Component(name="mis", summary="", target=f"misbehaving:{target}")
        return Selected(
            found=Found(kind="reward", component=component, distribution="mis-dist", version="1.2"), options=None
        )
    component = Component(name="mis", summary="", target="misbehaving:Misbehaves", options="misbehaving:Options")
    from misbehaving import Options  # type: ignore[import-not-found]

    found = Found(kind="reward", component=component, distribution="mis-dist", version="1.2")
    return Selected(found=found, options=Options(note=str(note), **options))


def executor(one: Selected, *, limit: float = 60.0, **choice: Any) -> RewardExecutor:
    return RewardExecutor([RewardChoice(name="mis", **choice)], [one], "cpu", setup_limit_s=limit)  # type: ignore[arg-type]


def samples(*texts: str, image: Any = None) -> list[Sample]:
    return [
        Sample(sample_id=i, group_id=0, prompt=Prompt(index=0, text="q", origin="data.jsonl:7"), text=t, image=image)
        for i, t in enumerate(texts)
    ]


def traces(note: Path, what: str) -> list[str]:
    return [line.partition(" ")[2] for line in note.read_text().splitlines() if line.startswith(what + " ")]


def gone(pid: int) -> bool:
    """Ended; a zombie that the system's init has yet to collect runs nothing. No process is called -1."""
    if pid < 0:
        return True
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def assert_next_batch_works(rewards: RewardExecutor) -> None:
    (scored,) = rewards.score(samples("fine"))
    assert (scored.value, scored.failure) == (2.0, None)


def test_scores_in_order_over_batches(note: Path) -> None:
    with executor(selected(note), weight=0.5) as rewards:
        rewards.setup()
        scored = rewards.score(samples(*["fine"] * 9))
        assert scored == [
            Scored(
                value=1.0, failure=None, drop_group=False, per_reward={"mis": 2.0}, sub_scores={"mis/half": 1.0}
            )
        ] * 9  # fmt: skip
        assert rewards.score([]) == []
        assert rewards.last_seconds["mis"] >= 0.0
        assert (rewards.failures, rewards.restarts, rewards.timeouts) == ({"mis": 0}, {"mis": 0}, {"mis": 0})
    assert traces(note, "batch") == ["4 fine", "4 fine", "1 fine"]


def test_the_recipe_sets_the_batch_size(note: Path) -> None:
    with executor(selected(note), batch_size=5) as rewards:
        rewards.setup()
        rewards.score(samples(*["fine"] * 7))
    assert traces(note, "batch") == ["5 fine", "2 fine"]


def test_raising_fails_the_batch_and_no_other(note: Path, caplog: pytest.LogCaptureFixture) -> None:
    with executor(selected(note)) as rewards:
        rewards.setup()
        scored = rewards.score(samples("fine", "a", "b", "c", "raise", "d"))
        assert [s.value for s in scored] == [2.0] * 4 + [None] * 2
        assert scored[4].failure == "reward 'mis' of mis-dist 1.2: KeyError: 'told to'"
        assert scored[4].per_reward == {}
        assert rewards.failures == {"mis": 2}
        assert rewards.restarts == {"mis": 0}
        assert_next_batch_works(rewards)
    assert traces(note, "batch")[1] == "2 raise"
    assert "misbehaving.py" in caplog.text  # the worker's traceback


@pytest.mark.parametrize("busy", [False, True])
def test_hanging_is_killed_at_the_deadline_with_its_children(note: Path, busy: bool) -> None:
    with executor(selected(note, child=True, busy=busy), deadline_s=2.0) as rewards:
        rewards.setup()
        assert_next_batch_works(rewards)
        before = time.monotonic()
        (scored,) = rewards.score(samples("hang"))
        assert 2.0 <= time.monotonic() - before < 15.0
        assert scored.value is None
        assert scored.failure == "reward 'mis' of mis-dist 1.2: timed out after 2 s"
        assert traces(note, "hanging") == ["1"]  # it did hang
        worker, child, daemon = (int(p) for p in traces(note, "pid")[:3])
        assert len({worker, child, daemon}) == 3
        assert gone(worker)
        assert gone(child)
        assert gone(daemon)
        assert (rewards.timeouts, rewards.restarts) == ({"mis": 1}, {"mis": 1})
        assert_next_batch_works(rewards)
        assert int(traces(note, "pid")[3]) != worker


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("exit", "its worker exited with status 3"),
        ("sysexit", "its worker exited with status 7"),
        ("segfault", "its worker was killed by SIGSEGV (Segmentation fault)"),
        ("killed", "its worker was killed by SIGKILL (Killed, by the kernel when memory runs out, or by an operator)"),
    ],
)
def test_dying_fails_the_batch_and_names_the_signal(note: Path, word: str, reason: str) -> None:
    with executor(selected(note)) as rewards:
        rewards.setup()
        scored = rewards.score(samples(word, "b", "c", "d", "fine"))
        assert {s.failure for s in scored[:4]} == {f"reward 'mis' of mis-dist 1.2: {reason}"}
        assert scored[4].value == 2.0  # by the replacement
        first, second = (int(p) for p in traces(note, "pid"))
        assert gone(first)
        assert not gone(second)
        assert rewards.restarts == {"mis": 1}
        assert_next_batch_works(rewards)


def test_a_replacement_that_cannot_be_set_up_stops_the_run(note: Path) -> None:
    with executor(selected(note)) as rewards:
        rewards.setup()
        (scored,) = rewards.score(samples("exit-for-good"))
        assert "exited with status 3" in (scored.failure or "")
        with pytest.raises(RewardError, match="failed to set up: ValueError: no weights here"):
            rewards.score(samples("fine"))


def test_a_frozen_worker_cannot_hold_a_large_batch_beyond_the_deadline(note: Path) -> None:
    image = np.zeros((4000, 2000, 3), dtype=np.uint8)  # more than a socket holds, so that sending blocks
    with executor(selected(note), deadline_s=2.0) as rewards:
        rewards.setup()
        worker = int(traces(note, "pid")[0])
        os.kill(worker, signal.SIGSTOP)
        assert eventually(lambda: psutil.Process(worker).status() == psutil.STATUS_STOPPED)
        (scored,) = rewards.score(samples("image", image=image))
        assert "timed out after 2 s" in (scored.failure or "")
        assert gone(worker)
        assert traces(note, "batch") == []  # it never arrived
        assert rewards.score(samples("image", image=image))[0].value == 0.0


def test_stopping_does_not_wait_for_other_workers(note: Path) -> None:
    choices = [RewardChoice(name="hangs"), RewardChoice(name="stops", run="inline", on_failure="stop")]  # type: ignore[arg-type]
    failing = selected(note, "environment")
    with RewardExecutor(choices, [selected(note), failing], "cpu") as rewards:
        rewards.setup()
        begin = time.monotonic()
        with pytest.raises(RewardError, match="reward 'stops' of mis-dist"):
            rewards.score(samples("hang"))
        assert time.monotonic() - begin < 20  # its deadline is 60


def test_a_worker_killed_between_batches_is_replaced(note: Path) -> None:
    with executor(selected(note)) as rewards:
        rewards.setup()
        assert_next_batch_works(rewards)
        os.kill(int(traces(note, "pid")[0]), signal.SIGKILL)
        guard = rewards.worker_pids["mis"]
        assert eventually(lambda: gone(guard))
        assert_next_batch_works(rewards)
        assert (rewards.failures, rewards.restarts) == ({"mis": 0}, {"mis": 1})


@pytest.mark.parametrize("run", ["worker", "inline"])
@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("nan", "returned NaN"),
        ("inf", "returned infinity"),
        ("nan-sub", "returned NaN as sub-score 'part'"),
        ("fail", "cannot say"),
    ],
)
def test_unusable_values_fail_their_own_sample(note: Path, run: str, word: str, reason: str) -> None:
    with executor(selected(note), run=run) as rewards:
        rewards.setup()
        scored = rewards.score(samples("fine", word, "fine"))
        assert [s.value for s in scored] == [2.0, None, 2.0]
        assert scored[1].failure == f"reward 'mis' of mis-dist 1.2: {reason}"
        assert rewards.failures == {"mis": 1}


@pytest.mark.parametrize("run", ["worker", "inline"])
@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("count", "score() returned 3 results for 2 samples"),
        ("type", "result 0 of score() is a float; return RewardResult(value=...) or (failure=...)"),
        ("generator", "score() returned generator; return a list with one RewardResult a sample"),
        ("both", "result 0 of score() has both a value and a failure"),
        ("string", "result 0 of score(): value is a str; return a Python or numpy number"),
    ],
)
def test_broken_contracts_fail_the_batch(note: Path, run: str, word: str, reason: str) -> None:
    with executor(selected(note), run=run) as rewards:
        rewards.setup()
        scored = rewards.score(samples(word, "fine"))
        assert {s.failure for s in scored} == {f"reward 'mis' of mis-dist 1.2: broke its contract: {reason}"}
        assert_next_batch_works(rewards)


def test_inline_exceptions_are_failures(note: Path) -> None:
    with executor(selected(note), run="inline") as rewards:
        rewards.setup()
        (scored,) = rewards.score(samples("raise"))
        assert scored.failure == "reward 'mis' of mis-dist 1.2: KeyError: 'told to'"
        assert_next_batch_works(rewards)
        assert rewards.worker_pids == {}


def test_large_samples_arrive_whole(note: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (1600, 1400, 3), dtype=np.uint8)
    batch = samples("image", "image", "image", image=image)
    assert image.nbytes * 3 > 20e6
    with executor(selected(note)) as rewards:
        rewards.setup()
        assert [s.value for s in rewards.score(batch)] == [float(image.mean())] * 3


@pytest.mark.parametrize("run", ["worker", "inline"])
def test_a_failing_setup_stops_with_its_traceback(note: Path, run: str) -> None:
    with executor(selected(note), run=run, device="broken") as rewards:
        with pytest.raises(RewardError, match=r"(?s)reward 'mis' of mis-dist 1.2 failed to set up: ValueError: no weigh"
                           r".*misbehaving\.py.*raise ValueError") as caught:  # fmt: skip
            rewards.setup()
        assert "Traceback" in str(caught.value)


def test_a_worker_that_dies_or_hangs_in_setup_stops(note: Path) -> None:
    with executor(selected(note), device="dies") as rewards, pytest.raises(RewardError, match="exited with status 4"):
        rewards.setup()
    with (
        executor(selected(note), device="slow", limit=5.0) as rewards,
        pytest.raises(RewardError, match="not done after 5 s; the worker was killed"),
    ):
        rewards.setup()
    assert traces(note, "device") == ["dies", "slow"]


def test_rejected_targets_say_what_to_do(note: Path) -> None:
    component = Component(name="mis", summary="", target="misbehaving:Options")
    wrong = Selected(
        found=Found(kind="reward", component=component, distribution="mis-dist", version="1.2"), options=None
    )
    with (
        executor(wrong) as rewards,
        pytest.raises(RewardError, match=r"must be a subclass of mmrl_core\.Reward or a func"),
    ):
        rewards.setup()


def test_retries_score_failed_samples_again(note: Path) -> None:
    with executor(selected(note), retries=1) as rewards:
        rewards.setup()
        scored = rewards.score(samples("flaky", "fine"))
        assert [s.value for s in scored] == [2.0, 2.0]
        assert rewards.failures == {"mis": 0}
        assert [s.value for s in rewards.score(samples("fine", "fail"))] == [2.0, None]
    assert Path(f"{note}.tried").exists()  # the first attempt did fail
    assert traces(note, "batch") == ["2 flaky", "2 flaky", "2 fine", "1 fail"]


def test_retries_after_a_deadline_use_the_replacement(note: Path) -> None:
    with executor(selected(note), retries=1, deadline_s=1.0) as rewards:
        rewards.setup()
        (scored,) = rewards.score(samples("hang"))
        assert scored.value is None
        assert (rewards.timeouts, rewards.restarts, rewards.failures) == ({"mis": 2}, {"mis": 2}, {"mis": 1})
    assert traces(note, "hanging") == ["1", "1"]


@pytest.mark.parametrize("run", ["worker", "inline"])
def test_policies_for_failures(note: Path, run: str) -> None:
    for policy, drops in (("drop_sample", False), ("drop_group", True)):
        with executor(selected(note), run=run, on_failure=policy) as rewards:
            rewards.setup()
            scored = rewards.score(samples("fine", "fail"))
            assert [s.drop_group for s in scored] == [False, drops]
            assert [s.value for s in scored] == [2.0, None]
    with executor(selected(note), run=run, on_failure="stop") as rewards:
        rewards.setup()
        with pytest.raises(
            RewardError, match=r"mis-dist 1\.2 failed for 1 of 2.*sample 1 of data\.jsonl:7: cannot say"
        ):
            rewards.score(samples("fine", "fail"))


def test_one_failed_reward_leaves_no_value_and_others_count(note: Path) -> None:
    choices = [RewardChoice(name="a", weight=2.0), RewardChoice(name="b", run="inline", on_failure="drop_group")]  # type: ignore[arg-type]
    with RewardExecutor(choices, [selected(note), selected(note)], "cpu") as rewards:
        rewards.setup()
        (fine,) = rewards.score(samples("fine"))
        assert fine.value == 6.0
        (failed,) = rewards.score(samples("nan"))
        assert failed.value is None
        assert failed.drop_group
        assert failed.failure == "reward 'a' of mis-dist 1.2: returned NaN; reward 'b' of mis-dist 1.2: returned NaN"


def test_environment_is_stripped_and_streams_are_apart(
    note: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK ROLE_NAME MASTER_ADDR"
    launcher = [*words.split(), "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"]
    for name in launcher:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("KEPT_FOR_REWARDS", "yes")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with executor(selected(note, "environment")) as rewards:
        rewards.setup()
        failure = rewards.score(samples("x"))[0].failure
    assert failure is not None
    seen = json.loads(failure.partition(": ")[2])
    assert [name for name in launcher if name in seen["env"]] == []
    assert seen["env"]["KEPT_FOR_REWARDS"] == "yes"
    assert seen["env"]["OMP_NUM_THREADS"] == "1"
    assert (seen["stdin"], seen["main"], seen["torch"], seen["session"]) == ("", True, False, True)
    captured = capfd.readouterr()
    assert "printed by a reward" in captured.err
    assert "printed by a reward" not in captured.out


def test_workers_score_at_the_same_time(note: Path) -> None:
    names = ["a", "b", "c"]
    with RewardExecutor(
        [RewardChoice(name=n) for n in names],  # type: ignore[arg-type]
        [selected(note, "slow")] * 3,
        "cpu",
    ) as rewards:
        rewards.setup()
        begin = time.monotonic()
        (scored,) = rewards.score(samples("x"))
        seconds = time.monotonic() - begin
    assert scored.value == 3.0
    assert all(rewards.last_seconds[n] >= 0.5 for n in names)
    assert seconds < sum(rewards.last_seconds.values())


def test_auto_device_is_the_ranks_own(note: Path) -> None:
    with RewardExecutor([RewardChoice(name="mis", device="auto")], [selected(note)], "cuda:3") as rewards:  # type: ignore[arg-type]
        rewards.setup()
    assert traces(note, "device") == ["cuda:3"]


def test_close_ends_everything_and_can_be_repeated(note: Path) -> None:
    rewards = executor(selected(note))
    rewards.start()
    rewards.setup()
    guard, worker = rewards.worker_pids["mis"], int(traces(note, "pid")[0])
    assert not gone(guard)
    assert not gone(worker)
    rewards.close()
    rewards.close()
    assert gone(guard)
    assert gone(worker)


@pytest.mark.parametrize(("busy", "forked"), [(False, False), (True, False), (False, True)])
def test_a_trainer_killed_9_leaves_no_process(note: Path, module_directory: Path, busy: bool, forked: bool) -> None:
    """`forked`: a fork of the trainer, such as a data loader's, survives it and holds its ends of all sockets open."""
    script = f"""
        import os, sys, time
        sys.path.insert(0, {str(module_directory)!r})
        from misbehaving import Options
        from mmrl_core.contracts import Prompt, Sample
        from mmrl_core.hookspecs import Component
        from mmrl_core.plugins import Found, Selected
        from mmrl_core.recipe import RewardChoice
        from mmrl_core.rewards.executor import RewardExecutor

        component = Component(name="mis", summary="", target="misbehaving:Misbehaves", options="misbehaving:Options")
        found = Found(kind="reward", component=component, distribution="d", version="1")
        chosen = Selected(found=found, options=Options(note={str(note)!r}, child=True, busy={busy}))
        with RewardExecutor([RewardChoice(name="mis")], [chosen], "cpu") as rewards:
            rewards.setup()
            fork = os.fork() if {forked} else -1
            if fork == 0:
                time.sleep(600)
            print(rewards.worker_pids["mis"], fork, flush=True)
            rewards.score([Sample(sample_id=0, group_id=0, prompt=Prompt(index=0, text="q"), text="hang")])
    """
    trainer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    try:
        assert trainer.stdout is not None
        guard, fork = map(int, trainer.stdout.readline().split())
        assert eventually(lambda: traces(note, "hanging") == ["1"])
        pids = [guard, *(int(p) for p in traces(note, "pid"))]
        assert len(set(pids)) == 4  # guard, worker, its child, its daemon
        assert not any(gone(p) for p in pids)
    finally:
        trainer.kill()
        trainer.wait()
        trainer.stdout.close()
    assert trainer.returncode == -signal.SIGKILL
    try:
        assert eventually(lambda: all(gone(p) for p in pids))
        assert gone(fork) is not forked
    finally:
        if forked:
            os.kill(fork, signal.SIGKILL)


def test_many_batches_pass_through(note: Path) -> None:
    with executor(selected(note), batch_size=2) as rewards:
        rewards.setup()
        assert [s.value for s in rewards.score(samples(*["fine"] * 400))] == [2.0] * 400
    assert len(traces(note, "batch")) == 200
