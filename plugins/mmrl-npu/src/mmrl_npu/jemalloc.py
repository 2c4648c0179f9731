"""Where the allocator jemalloc is: with glibc's, the workers of Ray keep the memory that they have freed."""

from __future__ import annotations

from mmrl_npu.machine import Machine

LIBRARY = "libjemalloc.so.2"
_PLACES = (
    "/usr/lib/aarch64-linux-gnu",  # Debian and Ubuntu
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib64",  # openEuler
    "/usr/local/lib",  # built from source
)


def find(machine: Machine) -> str | None:
    """The library's path, or None."""
    paths = [f"{place}/{LIBRARY}" for place in _PLACES]
    return next((path for path in paths if machine.path(path).exists()), None)
