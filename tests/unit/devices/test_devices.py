"""DeviceOps of the built-in devices, their probes and the table of peaks."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from mmrl_core.contracts import DeviceOps
from mmrl_core.devices import probes
from mmrl_core.devices.cpu import CpuDevice
from mmrl_core.devices.cuda import CudaDevice
from mmrl_core.devices.peaks import peak_of
from mmrl_core.errors import DeviceError

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def device(request: pytest.FixtureRequest) -> DeviceOps:
    made: DeviceOps = {"cpu": CpuDevice, "cuda": CudaDevice}[request.param]()
    made.activate(0)
    return made


def test_activate_and_names(device: DeviceOps) -> None:
    assert device.torch_device.type == device.name
    assert device.device_count() >= 1
    assert "gloo" in device.process_group_backend, "CPU tensors travel through it too"


def test_supported_types_really_train(device: DeviceOps) -> None:
    assert device.supports(torch.float32)
    assert not device.supports(torch.int64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if not device.supports(dtype):
            continue
        layers = torch.nn.Sequential(torch.nn.Embedding(7, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 7))
        network = layers.to(device.torch_device, dtype)
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, fused="adamw" in device.fused_ops())
        ids = torch.arange(7, device=device.torch_device)
        losses = []
        for _ in range(5):
            loss = torch.nn.functional.cross_entropy(network(ids).float(), ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]


def test_random_state_round_trip(device: DeviceOps) -> None:
    device.seed(5)
    state = device.rng_state()
    assert state.dtype == torch.uint8
    assert state.device.type == "cpu"
    first = torch.rand(4, device=device.torch_device)
    other = torch.rand(4, device=device.torch_device)
    device.set_rng_state(state)
    assert torch.equal(torch.rand(4, device=device.torch_device), first)
    assert not torch.equal(first, other)
    device.seed(5)
    assert torch.equal(torch.rand(4, device=device.torch_device), first)


def touched(size: int) -> mmap.mmap:
    """Memory straight from the system: the heap of a long process may have a hole that is large enough."""
    block = mmap.mmap(-1, size)
    block[:: mmap.PAGESIZE] = b"x" * len(block[:: mmap.PAGESIZE])
    return block


def test_memory_sees_an_allocation(device: DeviceOps) -> None:
    size = 64 << 20
    device.empty_cache()
    device.reset_peak_memory()
    before = device.memory()
    block = touched(size) if device.name == "cpu" else torch.ones(size, dtype=torch.uint8, device=device.torch_device)
    during = device.memory()
    del block
    after = device.memory()
    assert before.allocated is not None
    assert during.allocated is not None
    assert after.peak is not None
    assert during.total is not None
    assert during.allocated - before.allocated > 0.9 * size
    assert after.peak >= during.allocated - (1 << 20)
    assert during.allocated < during.total


def test_elapsed(device: DeviceOps) -> None:
    with device.elapsed() as seconds:
        time.sleep(0.02)
    assert 0.02 <= seconds() < 2
    assert seconds() == seconds()
    with pytest.raises(AssertionError), device.elapsed() as early:
        early()


def test_deterministic_switch(device: DeviceOps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        device.set_deterministic(True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        device.set_deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_profiler_sees_work(device: DeviceOps) -> None:
    with torch.profiler.profile(activities=list(device.profiler_activities())) as profile:
        torch.ones(8, 8, device=device.torch_device) @ torch.ones(8, 8, device=device.torch_device)
    assert any("mm" in event.key for event in profile.key_averages())


# ------------------------------------------------------------------------------------------------------------------ cpu


def test_cpu_peaks_are_unknown() -> None:
    assert CpuDevice().peak_flops(torch.float32) is None
    assert CpuDevice().peak_bandwidth() is None


def test_cpu_memory_is_psutils_and_the_peak_is_not_the_parents() -> None:
    assert CpuDevice().memory().allocated == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)
    code = (
        "import subprocess, sys; big = bytearray(900 << 20); big[::4096] = b'x' * len(big[::4096]); "
        "child = 'from mmrl_core.devices.cpu import CpuDevice; print(CpuDevice().memory().peak)'; "
        "print(subprocess.run([sys.executable, '-c', child], capture_output=True, text=True).stdout)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert int(done.stdout) < 800 << 20, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot reset the peak")
def test_cpu_peak_can_be_reset() -> None:
    device = CpuDevice()
    touched(128 << 20).close()
    high = device.memory().peak
    device.reset_peak_memory()
    low = device.memory().peak
    assert high is not None
    assert low is not None
    assert low < high - (100 << 20)


# ----------------------------------------------------------------------------------------------------------------- cuda


def test_cuda_names_both_numbers_when_there_are_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(DeviceError, match=r"local rank 2 .* sees 2 \(CUDA_VISIBLE_DEVICES=0,1\)"):
        CudaDevice().activate(2)


def test_cuda_refuses_an_irreproducible_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(DeviceError, match=r"CUBLAS_WORKSPACE_CONFIG=:0:0 is not reproducible.*:4096:8"):
        CudaDevice().set_deterministic(True)
    assert not torch.are_deterministic_algorithms_enabled()


def test_cuda_peaks_follow_the_type(monkeypatch: pytest.MonkeyPatch) -> None:
    device = CudaDevice()
    monkeypatch.setattr(device, "_device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    assert device.peak_flops(torch.bfloat16) == 312e12
    assert device.peak_flops(torch.float32) == 19.5e12
    assert device.peak_flops(torch.int8) is None
    assert device.peak_bandwidth() == 2039e9
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert device.peak_flops(torch.float32) == 156e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA Imaginary 9000")
    assert device.peak_flops(torch.bfloat16) is None
    assert device.peak_bandwidth() is None


@pytest.mark.parametrize(
    ("name", "half", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5e12, 3350e9),
        ("NVIDIA H100 PCIe", 756.5e12, 2000e9),
        ("NVIDIA H200", 989.5e12, 4800e9),
        ("NVIDIA L40S", 362.05e12, 864e9),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 1008e9),
        ("Tesla V100-SXM2-32GB", 125e12, 900e9),
    ],
)
def test_peaks_of_known_chips(name: str, half: float, bandwidth: float) -> None:
    peak = peak_of(name)
    assert peak is not None
    assert peak.flops["float16"] == half
    assert peak.bandwidth == bandwidth


@pytest.mark.parametrize(
    "name", ["NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H200 MIG 3g.71gb", "NVIDIA GeForce RTX 4090 Laptop GPU", ""]
)
def test_slices_and_lookalikes_are_unknown(name: str) -> None:
    assert peak_of(name) is None


def test_volta_has_no_bfloat16_rate() -> None:
    peak = peak_of("Tesla V100-SXM2-16GB")
    assert peak is not None
    assert set(peak.flops) == {"float16", "float32"}


# --------------------------------------------------------------------------------------------------------------- probes


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A machine with driver, GPU node and a PyTorch that is not imported; parts can be taken away."""
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: name)
    monkeypatch.setattr(probes, "_DEV", tmp_path)
    monkeypatch.setattr(probes, "_torch_build", lambda: ("2.13.0", True))
    (tmp_path / "nvidia0").touch()
    (tmp_path / "nvidiactl").touch()
    return types.SimpleNamespace(dev=tmp_path, patch=monkeypatch)


def test_probe_finds_a_gpu_without_torch(machine: Any) -> None:
    answer = probes.cuda()
    assert answer.available
    assert answer.reason == "1 GPU(s), PyTorch 2.13.0"
    assert "torch" not in sys.modules


def test_probe_says_what_is_missing(machine: Any) -> None:
    machine.patch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "hides every GPU" in probes.cuda().reason
    machine.patch.delenv("CUDA_VISIBLE_DEVICES")
    machine.patch.setattr(probes, "_torch_build", lambda: ("2.13.0+cpu", False))
    answer = probes.cuda()
    assert (answer.available, answer.reason) == (False, "PyTorch 2.13.0+cpu is a CPU-only build")
    assert answer.cure.startswith("pip install")
    (machine.dev / "nvidia0").unlink()
    assert "/dev/nvidia0" in probes.cuda().reason

    def absent(name: str) -> None:
        raise OSError(name)

    machine.patch.setattr(ctypes, "CDLL", absent)
    assert "libcuda" in probes.cuda().reason
    assert probes.cuda().cure


def test_probe_asks_torch_when_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert probes.cuda().reason == "3 GPU(s)"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not probes.cuda().available


def test_build_of_torch_is_read_correctly() -> None:
    version, gpu = probes._torch_build() or ("", True)
    assert version == torch.__version__
    assert gpu == (torch.version.cuda is not None or torch.version.hip is not None)


def test_cpu_probe() -> None:
    assert probes.cpu().available
