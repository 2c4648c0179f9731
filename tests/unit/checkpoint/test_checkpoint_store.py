"""What a store keeps, refuses and says, on one rank."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mmrl_core.checkpoint.manifest import verify
from mmrl_core.checkpoint.store import Checkpoint, CheckpointStore
from mmrl_core.errors import CheckpointError
from mmrl_core.world import World

Store = Callable[..., CheckpointStore]


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path, World(), keep=2)


def shards(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "nested").mkdir()
        (folder / "shard_0").write_text(text)
        (folder / "nested" / "shard_1").write_bytes(os.urandom(3000))

    return write


def folders(store: CheckpointStore) -> list[str]:
    return sorted(p.name for p in store.folder.iterdir())


def test_what_is_saved_comes_back(store: CheckpointStore) -> None:
    state = {"step": 10, "loss": 0.1 + 0.2, "tiny": 5e-324, "order": [1, 2], "none": None, "nan": math.nan, "ü": "日"}
    rng = {"cpu": torch.get_rng_state(), "sampler": torch.arange(6).reshape(2, 3).T}
    path = store.save(10, shards("weights"), state, rng)
    assert path == store.folder / "step_00000010"
    found = store.newest()
    assert found is not None
    assert (found.step, found.world_size, found.path) == (10, 1, path)
    assert repr(dict(found.state)) == repr(state)
    assert (found.backend / "shard_0").read_text() == "weights"
    back = found.tensors(0)
    assert back.keys() == rng.keys()
    assert all(torch.equal(back[name], rng[name]) for name in rng)


def test_nothing_there(store: CheckpointStore) -> None:
    assert store.newest() is None


def test_digests_are_sha256_of_the_files(store: CheckpointStore) -> None:
    path = store.save(1, shards("x"), {})
    manifest = json.loads((path / "manifest.json").read_text())
    on_disk = {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    del on_disk["manifest.json"]
    expected = {k: {"size": len(v), "sha256": hashlib.sha256(v).hexdigest()} for k, v in on_disk.items()}
    assert manifest["files"] == expected
    assert manifest["step"] == 1
    assert manifest["world_size"] == 1
    assert manifest["schema"] == 1


def test_permissions_are_the_users(store: CheckpointStore) -> None:
    old = os.umask(0o022)
    try:
        path = store.save(1, shards("x"), {})
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    assert stat.S_IMODE((path / "manifest.json").stat().st_mode) == 0o644


def test_keeps_the_newest(store: CheckpointStore) -> None:
    for step in (2, 4, 6, 8):
        store.save(step, shards("x"), {})
    assert folders(store) == ["step_00000006", "step_00000008"]


def test_never_prunes_what_it_just_wrote(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, World(), keep=1)
    store.save(100, shards("old run"), {})
    store.save(5, shards("new run"), {})
    assert folders(store) == ["step_00000005"]


def test_invalid_ones_do_not_count_as_kept(store: CheckpointStore) -> None:
    for step in (1, 2):
        store.save(step, shards("x"), {})
    (store.folder / "step_00000002" / "state.json").unlink()
    store.save(3, shards("x"), {})
    assert folders(store) == ["step_00000001", "step_00000002", "step_00000003"]


def test_saving_a_step_again_replaces_it(store: CheckpointStore) -> None:
    store.save(3, shards("first"), {"n": 1})
    store.save(3, shards("second"), {"n": 2})
    found = store.newest()
    assert found is not None
    assert found.state == {"n": 2}
    assert (found.backend / "shard_0").read_text() == "second"
    assert folders(store) == ["step_00000003"]


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "file", "says"),
    [
        (flip_a_byte, "backend/nested/shard_1", "content changed"),
        (flip_a_byte, "rng_rank0000.safetensors", "content changed"),
        (flip_a_byte, "state.json", "content changed"),
        (lambda p: os.truncate(p, 1000), "backend/nested/shard_1", "1000 bytes; the manifest says 3000"),
        (lambda p: p.unlink(), "backend/shard_0", "missing"),
        (lambda p: p.unlink(), "manifest.json", "cannot be read"),
        (lambda p: p.write_text("{"), "manifest.json", "cannot be read"),
        (lambda p: p.write_text("[]"), "manifest.json", "is not a manifest"),
        (lambda p: p.write_bytes(b"\xff\xfe\x00"), "manifest.json", "cannot be read"),
        (lambda p: p.write_text(p.read_text().replace('"step": 2', '"step": 9')), "manifest.json", "own digest"),
        (lambda p: p.write_text(p.read_text().replace('"schema": 1', '"schema": 7')), "manifest.json", "schema 7"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_and_named(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], file: str, says: str
) -> None:
    store.save(1, shards("good"), {})
    newer = store.save(2, shards("bad"), {})
    damage(newer / file)
    with pytest.raises(CheckpointError, match=says) as caught:
        verify(newer)
    assert str(newer / file) in str(caught.value)
    with caplog.at_level(logging.WARNING, logger="mmrl.checkpoint"):
        found = store.newest()
    assert found is not None
    assert found.step == 1
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert str(newer / file) in record.getMessage()
    store.save(2, shards("again"), {})
    assert Checkpoint.open(newer).step == 2


def test_an_extra_file_is_said_and_ignored(store: CheckpointStore, caplog: pytest.LogCaptureFixture) -> None:
    path = store.save(1, shards("x"), {})
    (path / "notes.txt").write_text("mine")
    found = store.newest()
    assert found is not None
    assert str(path / "notes.txt") in caplog.text


def test_a_renamed_folder_is_not_believed(store: CheckpointStore) -> None:
    store.save(1, shards("x"), {}).rename(store.folder / "step_00000050")
    assert store.newest() is None


def test_partial_and_strange_folders_are_ignored(store: CheckpointStore) -> None:
    path = store.save(1, shards("x"), {})
    path.rename(store.folder / ".step_00000001.partial")
    (store.folder / "step_abc").mkdir()
    (store.folder / "lost+found").mkdir()
    assert store.newest() is None
    store.save(2, shards("x"), {})
    assert folders(store) == ["lost+found", "step_00000002", "step_abc"]


def test_state_that_json_would_change_is_refused(store: CheckpointStore) -> None:
    for state, where in (({"a": {1: 2}}, r"state\.a: key 1"), ({"a": (1, 2)}, "tuple"), ({"a": [b"x"]}, r"a\[0\]")):
        with pytest.raises(CheckpointError, match=where):
            store.save(1, shards("x"), state)
        assert folders(store) == []


def test_a_rank_that_was_not_there(store: CheckpointStore) -> None:
    store.save(1, shards("x"), {})
    found = store.newest()
    assert found is not None
    with pytest.raises(CheckpointError, match=r"1 rank.*rank 1"):
        found.tensors(1)


def test_a_failed_write_leaves_the_previous_one(store: CheckpointStore) -> None:
    before = store.save(1, shards("good"), {})

    def fails(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError("shards") from OSError(28, "No space left on device", "half")

    with pytest.raises(CheckpointError) as caught:
        store.save(2, fails, {})
    message = str(caught.value)
    assert ".step_00000002.partial" in message
    assert "rank 0: RuntimeError caused by OSError: [Errno 28] No space left on device: 'half'" in message
    assert f"The previous checkpoint {before} is intact" in message
    assert "bytes needed" in message
    assert "bytes free" in message
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert folders(store) == ["step_00000001"]
    store.save(2, shards("now"), {})
    assert folders(store) == ["step_00000001", "step_00000002"]


def test_a_failure_after_the_old_one_was_moved_brings_it_back(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store.save(1, shards("good"), {"n": 1})
    rename = os.rename
    done = False

    def rename_once(source: Path, target: Path) -> None:
        nonlocal done
        if str(source).endswith(".partial") and not done:
            done = True
            raise PermissionError(13, "Permission denied", str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_once)
    with pytest.raises(CheckpointError, match=r"PermissionError.*step_00000001 is intact"):
        store.save(1, shards("other"), {"n": 2})
    assert folders(store) == ["step_00000001"]
    assert Checkpoint.open(path).state == {"n": 1}


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the run folder should be")
    store = CheckpointStore(tmp_path / "run", World(), keep=1)
    with pytest.raises(CheckpointError, match=r"NotADirectoryError.*no earlier valid checkpoint"):
        store.save(1, shards("x"), {})
