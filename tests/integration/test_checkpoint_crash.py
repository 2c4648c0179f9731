"""Checkpoints under fire: killed at every write point, a full disk, an error on one rank of two."""

from __future__ import annotations

import builtins
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from mmrl_core.checkpoint.manifest import verify
from mmrl_core.checkpoint.store import Checkpoint, CheckpointStore
from mmrl_core.errors import CheckpointError
from mmrl_core.world import World

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks and kills")


def shards(text: str, size: int = 2000) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for i in range(2):
            with open(folder / f"shard_{i}", "w") as file:
                file.write(text.ljust(size))

    return write


def save(run: Path, step: int, text: str, keep: int = 2) -> Path:
    return CheckpointStore(run, World(), keep).save(step, shards(text), {"text": text}, {"cpu": torch.get_rng_state()})


def in_child(action: Callable[[], None]) -> int:
    """Run `action` in a forked child and return its wait status; an exception there is exit status 1."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except BaseException:  # noqa: BLE001 - the child must not run on as a second pytest
            traceback.print_exc()
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class HalfWriter:
    """A file opened for writing, whose write may stop half-way."""

    def __init__(self, file: Any, reached: Callable[[], bool]) -> None:
        self._file = file
        self._reached = reached

    def write(self, content: Any) -> Any:
        if self._reached():
            self._file.write(content[: len(content) // 2])
            self._file.flush()
            die()
        return self._file.write(content)

    def __enter__(self) -> HalfWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def kill_at(n: int) -> None:
    """From now on the n-th call that changes or syncs the file system kills this process instead."""
    calls = 0

    def reached() -> bool:
        nonlocal calls
        calls += 1
        return calls == n

    def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if reached():
                die()
            return function(*args, **kwargs)

        return call

    def deadly_open(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not set(mode) & set("wax+"):
            return plain_open(file, mode, *args, **kwargs)
        if reached():
            die()
        return HalfWriter(plain_open(file, mode, *args, **kwargs), reached)

    plain_open = io.open
    for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir"):
        setattr(os, name, deadly(getattr(os, name)))
    shutil.rmtree = deadly(shutil.rmtree)  # type: ignore[assignment]
    io.open = builtins.open = deadly_open  # type: ignore[assignment]


def kill_everywhere(baseline: Path, scratch: Path, action: Callable[[Path], object]) -> Iterator[Path]:
    """`action` on copies of `baseline`, killed at its first, second, ... write point until it gets through."""
    for n in range(1, 500):
        run = scratch / f"killed_{n}"
        shutil.copytree(baseline, run)

        def child(n: int = n, run: Path = run) -> None:
            kill_at(n)
            action(run)

        status = in_child(child)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, "the save failed for another reason than the kill"
            assert n > 25, "the injector missed most of the write points"
            shutil.rmtree(run)
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
        yield run
        shutil.rmtree(run)
    pytest.fail("the save never completed")


def newest(run: Path) -> Checkpoint:
    found = CheckpointStore(run, World(), keep=2).newest()
    assert found is not None, sorted(p.name for p in (run / "checkpoints").iterdir())
    verify(found.path)
    return found


def names(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def test_killed_at_every_write_point_of_a_save_with_pruning(tmp_path: Path) -> None:
    baseline = tmp_path / "baseline"
    save(baseline, 1, "one")
    save(baseline, 2, "two")
    steps: list[int] = []
    for run in kill_everywhere(baseline, tmp_path, lambda run: save(run, 3, "three")):
        found = newest(run)
        assert found.state["text"] == {2: "two", 3: "three"}[found.step]
        assert (found.backend / "shard_1").read_text().strip() == found.state["text"]
        steps.append(found.step)
        save(run, 4, "four")
        assert newest(run).step == 4
        assert names(run) == [f"step_{found.step:08d}", "step_00000004"]
    assert steps == sorted(steps), "once the new one is complete it stays"
    assert set(steps) == {2, 3}


def test_killed_at_every_write_point_of_the_first_save(tmp_path: Path) -> None:
    baseline = tmp_path / "baseline"
    baseline.mkdir()
    for run in kill_everywhere(baseline, tmp_path, lambda run: save(run, 3, "three")):
        found = CheckpointStore(run, World(), keep=2).newest()
        assert found is None or found.step == 3
        save(run, 3, "again")
        assert newest(run).state["text"] == "again"
        assert names(run) == ["step_00000003"]


def test_killed_at_every_write_point_of_saving_a_step_again(tmp_path: Path) -> None:
    baseline = tmp_path / "baseline"
    save(baseline, 1, "old", keep=1)
    texts: list[str] = []
    between: Path | None = None
    for run in kill_everywhere(baseline, tmp_path, lambda run: save(run, 1, "new", keep=1)):
        found = newest(run)
        assert found.step == 1
        assert (found.backend / "shard_0").read_text().strip() == found.state["text"]
        texts.append(found.state["text"])
        if found.path.name.startswith("."):
            between = tmp_path / "between"
            shutil.copytree(run, between)
        save(run, 2, "next", keep=1)
        assert names(run) == ["step_00000002"]
    assert texts == sorted(texts, reverse=True)
    assert set(texts) == {"old", "new"}

    # The worst leftover: the old one moved away, the new one not yet in place. Now the next save is killed, too.
    assert between is not None
    for run in kill_everywhere(between, tmp_path, lambda run: save(run, 1, "third", keep=1)):
        assert newest(run).state["text"] in ("old", "third")


def limit_files_to(size: int) -> None:
    """Files of this process cannot grow beyond `size` bytes: a full disk, as seen by one process."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_full_disk_by_file_size_limit(tmp_path: Path) -> None:
    save(tmp_path, 1, "one")

    def child() -> None:
        limit_files_to(50_000)
        with pytest.raises(CheckpointError) as caught:
            CheckpointStore(tmp_path, World(), 2).save(2, shards("big", 200_000), {})
        message = str(caught.value)
        assert "File too large" in message
        assert ".step_00000002.partial" in message
        assert "step_00000001 is intact" in message
        assert names(tmp_path) == ["step_00000001"]

    assert in_child(child) == 0
    assert newest(tmp_path).step == 1


def test_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("may not mount a small disk here")
    try:
        save(disk, 1, "one")
        with pytest.raises(CheckpointError) as caught:
            CheckpointStore(disk, World(), 2).save(2, shards("big", 900_000), {})
        assert "No space left on device" in str(caught.value)
        assert "step_00000001 is intact" in str(caught.value)
        assert names(disk) == ["step_00000001"]
        save(disk, 2, "two")
        assert newest(disk).step == 2
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def two_ranks(tmp_path: Path, body: Callable[[World], Any]) -> list[Any]:
    """What `body` returned on each of two gloo ranks."""
    pids = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            try:
                dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=rank, world_size=2)
                answer = body(World(rank=rank, size=2, local_rank=rank))
                (tmp_path / f"answer_{rank}").write_text(json.dumps(answer))
                os._exit(0)
            except BaseException:  # noqa: BLE001 - the child must not run on as a second pytest
                traceback.print_exc()
            finally:
                os._exit(1)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    return [json.loads((tmp_path / f"answer_{rank}").read_text()) for rank in range(2)]


def test_two_ranks_agree(tmp_path: Path) -> None:
    run = tmp_path / "run"

    def body(world: World) -> Any:
        store = CheckpointStore(run, world, keep=2)

        def write(folder: Path) -> None:
            (folder / f"rank_{world.rank}").write_text(f"shard of {world.rank}")

        def fails_on_one(folder: Path) -> None:
            write(folder)
            if world.rank == 1:
                raise PermissionError(13, "Permission denied", "shard")

        answers: dict[str, Any] = {"before": store.newest()}
        with pytest.raises(CheckpointError) as caught:
            store.save(1, fails_on_one, {})
        answers["failure"] = str(caught.value)
        answers["left"] = names(run)
        world.barrier()
        store.save(2, write, {"from": world.rank}, {"x": torch.tensor([world.rank, 7])})
        world.barrier()
        found = store.newest()
        assert found is not None
        answers["found"] = [found.step, found.world_size, dict(found.state), found.tensors(world.rank)["x"].tolist()]
        answers["files"] = sorted(verify(found.path).files)
        return answers

    first, second = two_ranks(tmp_path, body)
    assert first["before"] is None
    assert first["failure"] == second["failure"]
    assert "rank 1: PermissionError: [Errno 13] Permission denied: 'shard'" in first["failure"]
    assert "rank 0:" not in first["failure"]
    assert first["left"] == second["left"] == []
    assert first["found"] == [2, 2, {"from": 0}, [0, 7]]
    assert second["found"] == [2, 2, {"from": 0}, [1, 7]]
    assert first["files"] == [
        "backend/rank_0",
        "backend/rank_1",
        "rng_rank0000.safetensors",
        "rng_rank0001.safetensors",
        "state.json",
    ]


def test_two_ranks_with_distributed_checkpoint_and_one_full_disk(tmp_path: Path) -> None:
    run = tmp_path / "run"

    def body(world: World) -> Any:
        store = CheckpointStore(run, world, keep=2)
        weights = {f"w{world.rank}": torch.full((50_000,), float(world.rank))}

        def write(folder: Path) -> None:
            dcp.save(weights, checkpoint_id=folder)

        store.save(1, write, {})
        if world.rank == 1:
            limit_files_to(50_000)
        with pytest.raises(CheckpointError) as caught:
            store.save(2, write, {})
        found = store.newest()
        assert found is not None
        back = {name: torch.zeros(50_000) for name in weights}
        dcp.load(back, checkpoint_id=found.backend)
        assert all(torch.equal(back[name], weights[name]) for name in weights)
        return {"failure": str(caught.value), "left": names(run)}

    first, second = two_ranks(tmp_path, body)
    assert first == second
    assert first["left"] == ["step_00000001"]
    assert "writing there fails: OSError: File too large" in first["failure"]
    assert "step_00000001 is intact" in first["failure"]
