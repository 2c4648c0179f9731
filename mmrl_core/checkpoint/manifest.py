"""What makes a checkpoint folder valid: a manifest with the size and SHA-256 of every file, and a digest of itself.

This module imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrl_core.errors import CheckpointError

log = logging.getLogger("mmrl.checkpoint")

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION = 1
"""Grows when an older mmrl could not read what a newer one writes."""

_CHUNK = 4 << 20


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One file as it was written."""

    size: int
    """Bytes."""
    sha256: str
    """Hexadecimal digest of the content."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of `manifest.json`."""

    step: int
    """The step after which the checkpoint was taken."""
    world_size: int
    """How many ranks wrote it."""
    created_by: str
    """Distribution and version that wrote it."""
    files: Mapping[str, FileRecord]
    """Every other file of the folder, by its path relative to the folder, with `/` between parts."""

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(record.size for record in self.files.values())

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        body = {
            "schema": SCHEMA_VERSION,
            "step": self.step,
            "created_by": self.created_by,
            "world_size": self.world_size,
            "files": {name: {"size": r.size, "sha256": r.sha256} for name, r in sorted(self.files.items())},
        }
        return json.dumps({**body, "digest": _digest(body)}, indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder. Raises CheckpointError naming the file and what is wrong with it."""
    path = folder / MANIFEST_NAME
    try:
        body = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(body, dict):
        raise CheckpointError(f"{path}: is not a manifest: it holds a {type(body).__name__}, not an object")
    stated = body.pop("digest", None)
    if body.get("schema") != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path}: manifest schema {body.get('schema')!r}; this mmrl reads {SCHEMA_VERSION}. "
            "Cure: resume with the mmrl version that wrote it"
        )
    if stated != _digest(body):
        raise CheckpointError(f"{path}: its own digest does not match its content; the file was damaged or edited")
    return Manifest(
        step=body["step"],
        world_size=body["world_size"],
        created_by=body["created_by"],
        files={name: FileRecord(size=r["size"], sha256=r["sha256"]) for name, r in body["files"].items()},
    )


def check_files(folder: Path, manifest: Manifest) -> None:
    """Every file of the manifest is there with the right size; contents are not read. Raises CheckpointError."""
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing; the manifest lists it with {record.size} bytes")
        size = path.stat().st_size
        if size != record.size:
            raise CheckpointError(f"{path}: {size} bytes; the manifest says {record.size}")


def verify(folder: Path) -> Manifest:
    """Check a checkpoint folder against its manifest, contents included.

    Raises CheckpointError naming the file and the mismatch. A file that the manifest does not list is never read, so
    it is worth a WARNING but does not make the checkpoint unusable.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    for name, record in manifest.files.items():
        try:
            found = file_record(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder / name}: cannot be read: {error}") from error
        if found.sha256 != record.sha256:
            raise CheckpointError(
                f"{folder / name}: its content changed: sha256 {found.sha256[:16]}..., "
                f"the manifest says {record.sha256[:16]}..."
            )
    for name in files_in(folder):
        if name not in manifest.files and name != MANIFEST_NAME:
            log.warning("%s is not in the manifest of its checkpoint; it is ignored", folder / name)
    return manifest


def files_in(folder: Path) -> list[str]:
    """Paths of every file below a folder, relative to it, sorted."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())


def file_record(path: Path, *, sync: bool = False) -> FileRecord:
    """Size and digest of a file; with `sync` its content is also forced to the disk."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
        if sync:
            os.fsync(file.fileno())
    return FileRecord(size=size, sha256=digest.hexdigest())


def _digest(body: Mapping[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
