"""Peak memory by phase, in a real process."""

from __future__ import annotations

import sys

import pytest

from mmrl_core.devices.cpu import CpuDevice
from mmrl_core.perf.phase_memory import PeakGauge, PhasePeaks

pytestmark = pytest.mark.skipif(not PeakGauge(CpuDevice()).available, reason="needs Linux's /proc with clear_refs")

MB = 1_000_000


def use(megabytes: int) -> bytes:
    """Memory that is really touched."""
    return b"\1" * (megabytes * MB)


def test_a_phase_has_the_peak_within_it() -> None:
    timers = PhasePeaks(CpuDevice())
    timers.watch(True)
    kept = []
    with timers("all"):
        with timers("rollout"):
            use(200)  # gone at once
        with timers("update"):
            use(100)
        with timers("adv"):
            kept.append(use(50))
        with timers("reference_model"):
            pass
    peaks = timers.peaks()
    assert set(peaks) == {"all", "rollout", "update", "adv", "reference_model"}
    assert peaks["rollout"] - peaks["update"] == pytest.approx(100 * MB, abs=10 * MB)
    assert peaks["all"] == peaks["rollout"]
    assert peaks["reference_model"] - peaks["adv"] == pytest.approx(0, abs=10 * MB), "what is kept counts later too"
    assert peaks["update"] - peaks["adv"] == pytest.approx(50 * MB, abs=10 * MB)


def test_a_phase_within_another_counts_for_both() -> None:
    timers = PhasePeaks(CpuDevice())
    timers.watch(True)
    with timers("rollout"):
        use(20)
        with timers("resharding_to_infer"):
            use(150)
        use(20)
    peaks = timers.peaks()
    assert peaks["rollout"] == peaks["resharding_to_infer"]


def test_memory_that_the_allocator_keeps_is_not_in_use() -> None:
    """Small blocks, freed, stay with the process; the next phase must not be charged for them."""
    timers = PhasePeaks(CpuDevice())
    timers.watch(True)
    with timers("rollout"):
        many = [bytes(50_000) for _ in range(3000)]  # 150 MB in the allocator's heap
        del many
    with timers("update"):
        pass
    peaks = timers.peaks()
    assert peaks["rollout"] - peaks["update"] > 120 * MB


def test_mapped_files_do_not_count(tmp_path: object) -> None:
    import mmap

    timers = PhasePeaks(CpuDevice())
    timers.watch(True)
    with timers("rollout"):
        pass
    with timers("update"), open(sys.executable, "rb") as file:
        view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        sum(view[:: mmap.PAGESIZE])
    assert timers.peaks()["update"] - timers.peaks()["rollout"] < 3 * MB


def test_nothing_is_taken_unasked() -> None:
    timers = PhasePeaks(CpuDevice())
    with timers("all"):
        use(10)
    assert timers.peaks() == {}
    assert timers.collect()["timing/all"] > 0
    timers.watch(True)
    with timers("all"):
        pass
    timers.watch(False)
    with timers("all"):
        pass
    assert timers.peaks() == {}
