"""The peak memory of each phase of a step, on this rank."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmrl_core.contracts import DeviceOps
from mmrl_core.metrics.timers import PhaseTimers

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class PeakGauge:
    """The most memory in use since `reset`, in bytes.

    On an accelerator the device's own counter. On a CPU anonymous memory, that is the resident size without files
    that are mapped: which pages of a library are resident depends on what else the machine does. The kernel's mark is
    of the whole resident size; what is mapped now is taken off it. As the counters of accelerators do, it counts what
    is in use, not what an allocator keeps for later: `reset` hands that back (glibc). Needs Linux's /proc with
    `clear_refs`.
    """

    def __init__(self, device: DeviceOps) -> None:
        self._device = device
        self._host = device.name == "cpu"
        self.available = os.access(_CLEAR_REFS, os.W_OK) if self._host else device.memory().peak is not None
        """False: the peak of a phase cannot be known here."""
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if self._host and self.available else None

    def peak(self) -> int:
        """Bytes."""
        if not self._host:
            peak = self._device.memory().peak
            assert peak is not None
            return peak
        sizes = dict.fromkeys(("VmHWM", "RssFile", "RssShmem"), 0)
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name in sizes:
                sizes[name] = int(value.split()[0]) * 1024
        return sizes["VmHWM"] - sizes["RssFile"] - sizes["RssShmem"]

    def reset(self) -> None:
        """Start anew from what is in use now."""
        if self._trim is not None:
            self._trim(0)
        self._device.reset_peak_memory()


class PhasePeaks(PhaseTimers):
    """Phase timers that also take each phase's peak memory, in the steps for which that is asked.

    Taking peaks costs some time, so a step is measured for its time or for its memory.
    """

    def __init__(self, device: DeviceOps) -> None:
        super().__init__(device.synchronize)
        self._gauge = PeakGauge(device)
        self._wanted = False
        self._running: list[str] = []
        self._peaks: dict[str, int] = {}

    def watch(self, wanted: bool) -> None:
        """Whether to take peaks of the next step. Called between steps."""
        assert not self._running
        self._wanted = wanted and self._gauge.available
        self._peaks = {}

    def peaks(self) -> dict[str, int]:
        """Bytes by phase since `watch`; empty when they were not asked for or cannot be known."""
        return dict(self._peaks)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time a block as `phase`; a phase that contains another has at least its peak."""
        with super().__call__(phase):
            if not self._wanted:
                yield
                return
            self._boundary()
            self._running.append(phase)
            try:
                yield
            finally:
                self._boundary()
                self._running.pop()

    def _boundary(self) -> None:
        peak = self._gauge.peak()
        for phase in self._running:
            self._peaks[phase] = max(peak, self._peaks.get(phase, 0))
        self._gauge.reset()
