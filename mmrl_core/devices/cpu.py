"""The CPU as a training device."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import psutil
import torch
from torch import Tensor

from mmrl_core.contracts import DeviceOps, MemoryStats
from mmrl_core.devices.cores import usable_cores
from mmrl_core.vector_math import resolve_vector_math

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class CpuDevice(DeviceOps):
    """Host and device are one: nothing is copied, offloading is free, peaks of a chip are not known."""

    name: ClassVar[str] = "cpu"

    def activate(self, local_rank: int) -> torch.device:
        """Always `cpu`: any number of ranks may share the cores.

        Numbers below 1.2e-38 become 0 from here on. A peaked softmax over a large vocabulary is full of them, and a
        matrix product with denormal operands is more than ten times slower. Elementary functions are exact from their
        first call on (see `mmrl_core.vector_math`).
        """
        torch.set_flush_denormal(True)
        resolve_vector_math()
        return self.torch_device

    @property
    def torch_device(self) -> torch.device:
        """`cpu`."""
        return torch.device("cpu")

    @property
    def process_group_backend(self) -> str:
        """gloo."""
        return "gloo"

    def device_count(self) -> int:
        """Cores this process may run on. More ranks than that work, but take turns."""
        return usable_cores()

    def supports(self, dtype: torch.dtype) -> bool:
        """PyTorch has forward and backward kernels for all of these; the two short ones may be slower than fp32."""
        return dtype in {torch.float32, torch.float64, torch.bfloat16, torch.float16}

    def synchronize(self) -> None:
        """Nothing is queued on a CPU."""

    def memory(self) -> MemoryStats:
        """Bytes: resident set of this process, its peak, and the memory of the machine (or of its container)."""
        return MemoryStats(allocated=int(psutil.Process().memory_info().rss), peak=_peak_rss(), total=_total_memory())

    def reset_peak_memory(self) -> None:
        """Start a new peak where the kernel lets a process do that (Linux); elsewhere the peak is of its life."""
        if not os.access(_CLEAR_REFS, os.W_OK):
            return
        try:
            _CLEAR_REFS.write_text("5")  # proc(5): resets the peak resident set size
        except PermissionError:  # a sandbox may refuse what the file mode allows
            return

    def empty_cache(self) -> None:
        """PyTorch caches no host memory."""

    def rng_state(self) -> Tensor:
        """[N] uint8."""
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor) -> None:
        """Restore what `rng_state` returned."""
        torch.set_rng_state(state)

    def seed(self, seed: int) -> None:
        """Seed the generator."""
        torch.manual_seed(seed)

    def set_deterministic(self, enabled: bool) -> None:
        """PyTorch raises on an operator without a deterministic kernel while this is on."""
        torch.use_deterministic_algorithms(enabled)

    def elapsed(self) -> AbstractContextManager[Callable[[], float]]:
        """Wall-clock seconds of a block."""
        return _elapsed()

    def profiler_activities(self) -> Sequence[Any]:
        """CPU activity."""
        return [torch.profiler.ProfilerActivity.CPU]

    def fused_ops(self) -> frozenset[str]:
        """`adamw`: `torch.optim.AdamW(fused=True)` has a CPU kernel."""
        return frozenset({"adamw"})


@contextmanager
def _elapsed() -> Iterator[Callable[[], float]]:
    start = time.perf_counter()
    end: float | None = None

    def seconds() -> float:
        assert end is not None, "elapsed: ask for the seconds after the block"
        return end - start

    try:
        yield seconds
    finally:
        end = time.perf_counter()


def _peak_rss() -> int:
    """Bytes. getrusage's ru_maxrss starts at the size of the process that started this one (it survives exec), so
    Linux's own per-image mark is read where there is one."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _total_memory() -> int:
    total = int(psutil.virtual_memory().total)
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.exists() else ""
    return min(total, int(limit)) if limit.isdigit() else total
