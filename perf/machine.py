"""What a measurement ran on and with: rows of different machines are never compared. Standard library only."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
_CPUINFO = Path("/proc/cpuinfo")


def fingerprint(threads: int) -> dict[str, Any]:
    """The device and how much of it is used; `id` is a digest of the rest. `threads`: computing threads."""
    facts = {
        "device": "cpu",
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
    }
    text = "|".join(f"{name}={facts[name]}" for name in sorted(facts))
    return {**facts, "id": hashlib.sha256(text.encode()).hexdigest()[:12]}


def cpu_model() -> str:
    """The processor's name, with family, model and stepping where the name alone says little (Linux)."""
    if not _CPUINFO.exists():
        return platform.processor() or platform.machine()
    fields: dict[str, str] = {}
    for line in _CPUINFO.read_text().split("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    name = fields.get("model name", platform.machine())
    numbers = [fields[key] for key in ("cpu family", "model", "stepping") if key in fields]
    return f"{name} ({'/'.join(numbers)})" if numbers else name


def load_average() -> float | None:
    """Processes that wanted a core in the last minute: above the number of threads used, timings are not to be
    trusted. None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def versions(distributions: Sequence[str]) -> dict[str, str]:
    """Installed versions. Raises PackageNotFoundError for what is not installed."""
    return {name: importlib.metadata.version(name) for name in distributions}


def commit() -> str:
    """The repository's commit, with `+changes` when files differ from it; `not a git checkout` without one."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, check=False
            )
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return "not a git checkout"
    return f"{head}+changes" if git("status", "--porcelain", "--untracked-files=no") else head
