"""The code that is measured: this checkout as it is, or a commit of it in a folder of its own."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mmrl_core.errors import PerfError
from mmrl_core.perf import machine
from mmrl_core.perf.machine import NO_CHECKOUT


@dataclass(frozen=True, kw_only=True)
class Tree:
    """A folder with the package `mmrl_core`, and perhaps `plugins/*/src`, that a measuring process imports."""

    name: str
    """What people call it: a commit."""
    folder: Path
    """Its root."""
    is_checkout: bool = True
    """False: an installed package, which processes find by themselves."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """More variables of its processes."""

    @property
    def core(self) -> Path:
        """Where a process that runs this tree must have found `mmrl_core`."""
        return (self.folder / "mmrl_core").resolve()

    def variables(self) -> dict[str, str]:
        """The environment of its processes: ours, with the tree's code before anything that is installed.

        Of its plugins those that are installed here: what a plugin declares is read from the installed package.
        """
        merged = {**os.environ, **self.environment}
        plugins = (f for f in sorted(self.folder.glob("plugins/*/src")) if _is_installed(f.parent.name))
        sources = [str(self.folder), *map(str, plugins)] if self.is_checkout else []
        path = [*sources, *(p for p in merged.get("PYTHONPATH", "").split(os.pathsep) if p)]
        return {**merged, "PYTHONPATH": os.pathsep.join(path)}


def working_tree() -> Tree:
    """The code that runs now, uncommitted changes included."""
    commit = machine.commit()
    return Tree(name=commit, folder=machine.REPOSITORY, is_checkout=commit != NO_CHECKOUT)


def default_base() -> str:
    """The last commit when files differ from it, else the one before."""
    return "HEAD" if machine.commit().endswith("+changes") else "HEAD~1"


@contextmanager
def commit_tree(revision: str, scratch: Path) -> Iterator[Tree]:
    """The checkout's commit `revision` in a `git worktree` below `scratch`, which is removed after the block.

    Raises PerfError when there is no checkout or no such commit, or when that commit cannot be measured.
    """
    repository = machine.REPOSITORY
    if machine.commit() == NO_CHECKOUT:
        raise PerfError(
            f"{repository}: is not a git checkout of mmrl, so there is no commit to compare with. Run this in a "
            "checkout, or compare two files of mmrl perf run: mmrl perf compare"
        )
    commit = _git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if commit is None:
        raise PerfError(f"{revision!r} is no commit of {repository}. In a shallow clone, fetch it first")
    folder = scratch / f"commit-{commit[:12]}"
    if _git(repository, "worktree", "add", "--detach", "--quiet", str(folder), commit) is None:
        raise PerfError(f"git worktree add {folder} {commit} failed in {repository}")
    try:
        if not (folder / "mmrl_core" / "perf" / "process.py").is_file():
            raise PerfError(f"commit {commit[:12]} is older than mmrl perf, so it cannot be measured. Name a later one")
        yield Tree(name=commit[:12], folder=folder)
    finally:
        _git(repository, "worktree", "remove", "--force", str(folder))


def _is_installed(distribution: str) -> bool:
    return any(True for _ in importlib.metadata.distributions(name=distribution))


def _git(repository: Path, *arguments: str) -> str | None:
    done = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
