"""What runs on a node before any rank does. Its code is sent by value: the node may have no mmrl, or another one.

So this module imports nothing but the standard library.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import socket
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a node is asked."""

    packages: Sequence[str]
    """Distributions whose versions count, beside every one whose name begins with mmrl."""
    working_dir: str
    """The folder that ranks run in; relative paths start there."""
    run_dir: str
    token_file: str
    """A file in the run folder that the launcher has just written."""
    paths: Sequence[str]
    """Files and folders that the recipe names."""


def inspect(wanted: Wanted) -> dict[str, object]:
    """What this node has, as plain values: `host`, `python`, `versions`, `working_dir`, `token`, `unwritable` (None
    when the run folder can be written) and `paths` (what `describe` says of each; None: not there)."""
    inside = os.path.isdir(wanted.working_dir)
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "versions": versions(wanted.packages),
        "working_dir": inside,
        "token": _read(_below(wanted, wanted.token_file)) if inside else None,
        "unwritable": _unwritable(_below(wanted, wanted.run_dir)) if inside else None,
        "paths": {path: describe(_below(wanted, path)) for path in wanted.paths} if inside else {},
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of these distributions and of every one whose name begins with mmrl; those that are missing are left out."""
    found = {}
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if (name in packages or name.startswith("mmrl")) and name not in found:
            found[name] = distribution.version
    return found


def describe(path: str) -> str | None:
    """The same for the same content, as far as names and sizes tell; None when there is nothing."""
    if os.path.isfile(path):
        return f"a file of {os.path.getsize(path)} bytes"
    if not os.path.isdir(path):
        return None
    entries = []
    with os.scandir(path) as scan:
        for entry in scan:
            entries.append((entry.name, entry.stat().st_size if entry.is_file() else -1))
    digest = hashlib.sha256(repr(sorted(entries)).encode()).hexdigest()[:8]
    return f"a folder of {len(entries)} entries (digest of names and sizes {digest})"


def problems(node: str, found: Mapping[str, object], here: Mapping[str, object], wanted: Wanted) -> list[str]:
    """One line for each thing that keeps ranks from running on `node`; `here` is what the launching process has."""
    lines = []
    mine, theirs = here["versions"], found["versions"]
    assert isinstance(mine, dict)
    assert isinstance(theirs, dict)
    if found["python"] != here["python"]:
        lines.append(f"Python {found['python']} there, {here['python']} here")
    for name in sorted({*mine, *theirs}):
        if mine.get(name) != theirs.get(name):
            lines.append(f"{name} {theirs.get(name, 'not installed')} there, {mine.get(name, 'not installed')} here")
    if not found["working_dir"]:
        lines.append(f"no folder {wanted.working_dir}, where mmrl was started (launcher.working_dir names another)")
    elif found["token"] != here["token"]:
        lines.append(f"the run folder {wanted.run_dir} is not the one that this process writes: it must be shared")
    elif found["unwritable"] is not None:
        lines.append(f"the run folder {wanted.run_dir} cannot be written: {found['unwritable']}")
    paths, ours = found["paths"], here["paths"]
    assert isinstance(paths, dict)
    assert isinstance(ours, dict)
    for path, there in paths.items():
        if there is None:
            lines.append(f"nothing at {path}, which the recipe names")
        elif there != ours[path]:
            lines.append(f"{path} is {there}, here {ours[path] or 'nothing'}")
    return [f"node {node} ({found['host']}): {line}" for line in lines]


def _below(wanted: Wanted, path: str) -> str:
    return os.path.join(wanted.working_dir, path)


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError:
        return None


def _unwritable(folder: str) -> str | None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)
