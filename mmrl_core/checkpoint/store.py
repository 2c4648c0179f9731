"""Crash-safe checkpoints: written beside, forced to disk, renamed, and only then are older ones removed.

Folders below `run_dir/checkpoints/`:

=============================  =========================================================================
`step_00000010`                a checkpoint; it got this name only when everything in it was on the disk
`.step_00000010.partial`       being written, or left by a crash; never read
`.step_00000010.replaced`      the former checkpoint of a step that is saved again; read while there is no
                               `step_00000010`, so that one is valid at every instant
`.step_00000010.deleted`       being removed, or left by a crash; never read
=============================  =========================================================================

A rank can be killed at any instant: `newest` then finds the last complete checkpoint and the next `save` clears what
was left. All ranks must see the same file system.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from mmrl_core import __version__
from mmrl_core.checkpoint.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    check_files,
    file_record,
    files_in,
    read_manifest,
    verify,
)
from mmrl_core.errors import CheckpointError
from mmrl_core.world import World

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("mmrl.checkpoint")

R = TypeVar("R")

STATE_NAME = "state.json"
BACKEND_FOLDER = "backend"

_FINAL = re.compile(r"step_(\d{8,})")
_REPLACED = re.compile(r"\.(step_(\d{8,}))\.replaced")
_LEFTOVER = re.compile(r"\.step_\d{8,}\.(partial|deleted)")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose manifest and digests were right when it was opened."""

    path: Path
    step: int
    """The step after which it was taken."""
    state: Mapping[str, Any]
    """What `save` was given on rank 0: plain JSON."""
    world_size: int
    """How many ranks wrote it."""

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Verify and open one folder. Raises CheckpointError naming the file that is wrong."""
        manifest = verify(path)
        return cls(
            path=path,
            step=manifest.step,
            state=json.loads((path / STATE_NAME).read_bytes()),
            world_size=manifest.world_size,
        )

    @property
    def backend(self) -> Path:
        """The folder that the training backend wrote."""
        return self.path / BACKEND_FOLDER

    def tensors(self, rank: int) -> dict[str, Tensor]:
        """The tensors that `rank` saved, on the CPU.

        Raises CheckpointError when the checkpoint was written by fewer ranks.
        """
        if not 0 <= rank < self.world_size:
            raise CheckpointError(
                f"{self.path}: was written by {self.world_size} rank(s) and has no tensors of rank {rank}. "
                "Cure: resume with as many ranks, or do without what is kept per rank (checkpoint.load_rng: false)"
            )
        from safetensors.torch import load

        return dict(load((self.path / _tensors_name(rank)).read_bytes()))


class CheckpointStore:
    """The checkpoints of one run. `save` and `newest` are collective over the world."""

    def __init__(self, run_dir: Path, world: World, keep: int) -> None:
        assert keep >= 1
        self.folder = Path(run_dir) / "checkpoints"
        self._world = world
        self._keep = keep

    def save(
        self,
        step: int,
        write: Callable[[Path], None],
        state: Mapping[str, Any],
        tensors: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Write the checkpoint of `step` and remove those beyond `keep`; returns its folder.

        Every rank calls `write(folder)` with the same, existing, empty folder and saves its own `tensors`; rank 0's
        `state` (plain JSON: string keys, no tuples; floats come back bit for bit) is kept. A `write` that contains
        collectives must fail on all ranks or on none, as torch's distributed checkpoint does.

        Raises CheckpointError on every rank when any rank fails; nothing is left of the attempt and earlier
        checkpoints are untouched.
        """
        final = self.folder / f"step_{step:08d}"
        partial = self.folder / _partial_name(step)
        self._together(step, lambda: self._begin(partial), main_only=True)
        self._together(step, lambda: self._write_rank(partial, write, state, tensors or {}))
        names = self._together(step, lambda: files_in(partial), main_only=True)[0]
        assert names is not None
        mine = names[self._world.rank :: self._world.size]
        records = self._together(step, lambda: {name: file_record(partial / name, sync=True) for name in mine})
        merged = {name: record for share in records for name, record in (share or {}).items()}
        self._together(step, lambda: self._publish(partial, final, step, merged), main_only=True)
        if self._world.is_main:
            self._prune(final)
        self._world.barrier()
        return final

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint whose manifest and digests are right, or None.

        Rank 0 looks and every rank gets its answer. An invalid checkpoint is skipped with a WARNING that names the
        file and the mismatch. Raises CheckpointError when the folder cannot be read.
        """
        found: Checkpoint | None = None
        failure: str | None = None
        if self._world.is_main:
            try:
                found = self._newest_valid()
            except OSError as error:
                failure = f"{self.folder}: cannot be read: {error}"
        found, failure = self._world.broadcast((found, failure))
        if failure is not None:
            raise CheckpointError(failure)
        return found

    # ------------------------------------------------------------------------------------------------ parts of a save

    def _begin(self, partial: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        _sync_folder(self.folder.parent)
        self._clear_leftovers()
        partial.mkdir()
        (partial / BACKEND_FOLDER).mkdir()

    def _write_rank(
        self, partial: Path, write: Callable[[Path], None], state: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> None:
        if not (partial / BACKEND_FOLDER).is_dir():
            raise CheckpointError(
                f"rank {self._world.rank} does not see {partial}, which rank 0 made. "
                "Cure: put run_dir on a file system that all nodes share"
            )
        write(partial / BACKEND_FOLDER)
        from safetensors.torch import save

        content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        _write_file(partial / _tensors_name(self._world.rank), content)
        if self._world.is_main:
            _check_plain(state, "state")
            _write_file(partial / STATE_NAME, (json.dumps(state, indent=1) + "\n").encode())

    def _publish(self, partial: Path, final: Path, step: int, files: Mapping[str, FileRecord]) -> None:
        manifest = Manifest(step=step, world_size=self._world.size, created_by=f"mmrl-core {__version__}", files=files)
        _write_file(partial / MANIFEST_NAME, manifest.to_json().encode())
        for folder in sorted(p for p in partial.rglob("*") if p.is_dir()):
            _sync_folder(folder)
        _sync_folder(partial)
        replaced: Path | None = None
        if final.exists():
            replaced = self.folder / f".{final.name}.replaced"
            os.rename(final, replaced)
        os.rename(partial, final)
        _sync_folder(self.folder)
        if replaced is not None:
            _discard(replaced)

    def _prune(self, written: Path) -> None:
        """Keep the newest `keep` that look valid, the one just written among them."""
        kept = 1
        for _, path in self._final_folders():
            if path == written:
                continue
            try:
                # Sizes only: reading every older checkpoint at each save would cost more than the save.
                check_files(path, read_manifest(path))
            except CheckpointError:
                continue  # `newest` reports it; what we cannot read may be another version's and is not ours to delete
            if kept < self._keep:
                kept += 1
                continue
            deleted = path.with_name(f".{path.name}.deleted")
            try:
                os.rename(path, deleted)
                _sync_folder(self.folder)
            except OSError as error:
                log.warning("checkpoint %s is no longer needed but cannot be removed: %s", path, error)
                continue
            _discard(deleted)

    def _clear_leftovers(self) -> None:
        """Undo or finish what an interrupted save left. Only a writer may do this, never a reader."""
        for path in sorted(self.folder.iterdir()):
            replaced = _REPLACED.fullmatch(path.name)
            if replaced and not (self.folder / replaced[1]).exists():
                os.rename(path, self.folder / replaced[1])
            elif replaced or _LEFTOVER.fullmatch(path.name):
                shutil.rmtree(path)
        _sync_folder(self.folder)

    # ------------------------------------------------------------------------------------------------------- agreement

    def _together(self, step: int, action: Callable[[], R], *, main_only: bool = False) -> list[R | None]:
        """Run `action` on every rank (or rank 0) and return all results; a failure of one is a failure of all."""
        from torch.distributed.checkpoint.api import CheckpointException

        result: R | None = None
        cause: BaseException | None = None
        if self._world.is_main or not main_only:
            try:
                result = action()
            except (Exception, CheckpointException) as error:  # noqa: BLE001 - every rank must hear of it, then it is raised
                cause = error
        failure = None if cause is None else _describe(cause) + _write_trouble(self.folder / _partial_name(step), cause)
        answers = self._world.gather((result, failure))
        failures = [(rank, failure) for rank, (_, failure) in enumerate(answers) if failure is not None]
        if failures:
            self._fail(step, failures, cause)
        return [value for value, _ in answers]

    def _fail(self, step: int, failures: list[tuple[int, str]], cause: BaseException | None) -> NoReturn:
        """Remove what was written and raise the same CheckpointError on every rank."""
        message = ""
        if self._world.is_main:
            message = self._explain(step, failures)
        raise CheckpointError(self._world.broadcast(message)) from cause

    def _explain(self, step: int, failures: list[tuple[int, str]]) -> str:
        name = _partial_name(step)
        what = "; ".join(f"rank {rank}: {failure}" for rank, failure in failures[:4])
        more = f" (and {len(failures) - 4} more ranks)" if len(failures) > 4 else ""
        parts = [f"checkpoint of step {step} could not be written to {self.folder / name}: {what}{more}."]
        previous: Checkpoint | None = None
        try:
            if self.folder.is_dir():
                self._clear_leftovers()
            previous = self._newest_valid()
            needed = f"{read_manifest(previous.path).bytes:,} bytes needed (as the previous one), " if previous else ""
            parent = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
            parts.append(f"{needed}{shutil.disk_usage(parent).free:,} bytes free in {parent}.")
        except OSError as error:
            parts.append(f"Clearing up failed as well: {error}; remove {self.folder / name} by hand.")
        if previous is not None:
            parts.append(f"The previous checkpoint {previous.path} is intact.")
        else:
            parts.append("There is no earlier valid checkpoint.")
        return " ".join(parts)

    # --------------------------------------------------------------------------------------------------------- reading

    def _final_folders(self) -> list[tuple[int, Path]]:
        """(step, folder) of everything with a final name, newest first."""
        if not self.folder.is_dir():
            return []
        named = ((_FINAL.fullmatch(path.name), path) for path in self.folder.iterdir())
        return sorted(((int(match[1]), path) for match, path in named if match), reverse=True)

    def _newest_valid(self) -> Checkpoint | None:
        candidates = self._final_folders()
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                replaced = _REPLACED.fullmatch(path.name)
                if replaced and not (self.folder / replaced[1]).exists():
                    candidates.append((int(replaced[2]), path))
        for step, path in sorted(candidates, reverse=True):
            try:
                checkpoint = Checkpoint.open(path)
                if checkpoint.step != step:
                    raise CheckpointError(
                        f"{path / MANIFEST_NAME}: says step {checkpoint.step}; the folder was renamed"
                    )
                return checkpoint
            except CheckpointError as error:
                log.warning("skipping an invalid checkpoint: %s", error)
        return None


def _partial_name(step: int) -> str:
    return f".step_{step:08d}.partial"


def _tensors_name(rank: int) -> str:
    return f"rng_rank{rank:04d}.safetensors"


def _write_file(path: Path, content: bytes) -> None:
    """Write a new file and force it to the disk."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Force a folder's entries to the disk, so that names survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(path: Path) -> None:
    """Delete a folder that already has a name nobody reads; a failure wastes space and ends nothing."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        log.warning("%s is no longer needed but cannot be removed: %s", path, error)


def _check_plain(value: Any, where: str) -> None:
    """JSON gives back exactly what it was given, or this raises TypeError naming the place."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where}: key {key!r} is no string, and would come back as one")
            _check_plain(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            _check_plain(inner, f"{where}[{i}]")
    elif not (value is None or type(value) in (bool, int, float, str)):
        raise TypeError(f"{where}: {type(value).__name__} is not plain JSON; tensors go to `tensors`")


def _describe(error: BaseException) -> str:
    """One line; the operating system's error at the root of `error` if there is one, else the error itself."""
    wrapped = getattr(error, "failures", None)  # torch's CheckpointException: rank -> (exception, stack)
    if isinstance(wrapped, dict):
        return "torch.distributed.checkpoint: " + "; ".join(
            f"on rank {rank} {_describe(inner)}" for rank, (inner, _) in sorted(wrapped.items())
        )
    seen = [error]
    for current in seen:
        if isinstance(current, OSError):
            root = f"{type(current).__name__}: {current}"
            return root if current is error else f"{type(error).__name__} caused by {root}"
        seen += [e for e in (current.__cause__, current.__context__) if e is not None and e not in seen]
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _write_trouble(folder: Path, cause: BaseException) -> str:
    """What the operating system says when a little is written to `folder` now, or nothing when that works.

    torch reports a full disk as an unexpected position in a file; this finds out what it was.
    """
    if isinstance(cause, OSError) or not folder.is_dir():
        return ""
    probe = folder / f"probe_{os.getpid()}"
    try:
        _write_file(probe, bytes(1 << 20))
        probe.unlink()
    except OSError as error:
        return f" (writing there fails: {type(error).__name__}: {error.strerror})"
    return ""
