"""What a measurement ran on and with: rows of different machines are never compared. Imports no torch."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmrl_core.devices.cores import usable_cores

REPOSITORY = Path(__file__).resolve().parent.parent.parent
"""The folder that holds the package: a checkout, or site-packages."""
NO_CHECKOUT = "not a git checkout"
_CPUINFO = Path("/proc/cpuinfo")


def fingerprint(threads: int, *, device: str = "cpu", chip: str | None = None) -> dict[str, Any]:
    """The machine and how much of it is used; `id` is a digest of the rest.

    Args:
        threads: computing threads of a rank.
        device: the component's word.
        chip: what the driver calls the accelerator; None on a CPU.
    """
    facts: dict[str, Any] = {
        "device": device,
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
    }
    if chip is not None:
        facts["chip"] = chip
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


def commit(repository: Path = REPOSITORY) -> str:
    """The commit of the checkout `repository`, with `+changes` when tracked files differ from it; NO_CHECKOUT
    for an installed package."""
    head = _git(repository, "rev-parse", "--short=12", "HEAD")
    if head is None or _git(repository, "ls-files", "--error-unmatch", "mmrl_core/__init__.py") is None:
        return NO_CHECKOUT
    return f"{head}+changes" if _git(repository, "status", "--porcelain", "--untracked-files=no") else head


def _git(repository: Path, *arguments: str) -> str | None:
    """What git answers, or None when it fails or is not installed."""
    try:
        done = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
