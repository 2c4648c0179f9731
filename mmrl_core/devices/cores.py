"""Cores of the machine. Imports no torch."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Cores this process may run on: its affinity where the system has one, else all of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
