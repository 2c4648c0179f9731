"""NVIDIA GPUs through `torch.cuda`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmrl_core.contracts import DeviceOps, MemoryStats
from mmrl_core.devices.peaks import peak_of
from mmrl_core.errors import DeviceError

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_REPRODUCIBLE_WORKSPACES = (":4096:8", ":16:8")
"""The settings under which cuBLAS documents bit-reproducible results with several streams."""


class CudaDevice(DeviceOps):
    """One GPU a rank."""

    name: ClassVar[str] = "cuda"

    def __init__(self) -> None:
        self._device: torch.device | None = None

    def activate(self, local_rank: int) -> torch.device:
        """Make GPU `local_rank` current."""
        count = self.device_count()
        if local_rank >= count:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            shown = f" (CUDA_VISIBLE_DEVICES={visible})" if visible is not None else ""
            raise DeviceError(
                f"device cuda: local rank {local_rank} needs GPU {local_rank}, but PyTorch {torch.__version__} sees "
                f"{count}{shown}. Start at most {count} ranks here, make more GPUs visible, or use device: cpu"
            )
        self._device = torch.device("cuda", local_rank)
        torch.cuda.set_device(self._device)
        return self._device

    @property
    def torch_device(self) -> torch.device:
        """This rank's GPU."""
        assert self._device is not None, "activate first"
        return self._device

    @property
    def process_group_backend(self) -> str:
        """NCCL for GPU tensors; gloo for the core's small CPU values."""
        return "cpu:gloo,cuda:nccl"

    def device_count(self) -> int:
        """Visible GPUs."""
        return torch.cuda.device_count() if torch.cuda.is_available() else 0

    def supports(self, dtype: torch.dtype) -> bool:
        """bfloat16 needs hardware support (Ampere and later); emulation does not count."""
        if dtype == torch.bfloat16:
            return self.device_count() > 0 and torch.cuda.is_bf16_supported(including_emulation=False)
        return dtype in {torch.float32, torch.float64, torch.float16}

    def synchronize(self) -> None:
        """Wait for every stream of this rank's GPU."""
        torch.cuda.synchronize(self.torch_device)

    def memory(self) -> MemoryStats:
        """Bytes held by tensors, their peak, and the GPU's memory."""
        return MemoryStats(
            allocated=torch.cuda.memory_allocated(self.torch_device),
            peak=torch.cuda.max_memory_allocated(self.torch_device),
            total=torch.cuda.get_device_properties(self.torch_device).total_memory,
        )

    def reset_peak_memory(self) -> None:
        """Start a new peak measurement."""
        torch.cuda.reset_peak_memory_stats(self.torch_device)

    def empty_cache(self) -> None:
        """Return cached blocks to the driver."""
        torch.cuda.empty_cache()

    def rng_state(self) -> Tensor:
        """[N] uint8, on the CPU."""
        return torch.cuda.get_rng_state(self.torch_device)

    def set_rng_state(self, state: Tensor) -> None:
        """Restore what `rng_state` returned."""
        torch.cuda.set_rng_state(state, self.torch_device)

    def seed(self, seed: int) -> None:
        """Seed the GPU's and the CPU's generator."""
        torch.manual_seed(seed)
        torch.cuda.manual_seed(seed)

    def set_deterministic(self, enabled: bool) -> None:
        """Deterministic kernels, a reproducible cuBLAS workspace, no cuDNN autotuning. Call it before the first
        matrix product: cuBLAS reads its setting once."""
        if enabled:
            given = os.environ.setdefault(_CUBLAS, _REPRODUCIBLE_WORKSPACES[0])
            if given not in _REPRODUCIBLE_WORKSPACES:
                raise DeviceError(
                    f"device cuda: {_CUBLAS}={given} is not reproducible; unset it or set it to one of "
                    f"{', '.join(_REPRODUCIBLE_WORKSPACES)}"
                )
            torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(enabled)

    def elapsed(self) -> AbstractContextManager[Callable[[], float]]:
        """Seconds between two events on the current stream. Asking for them waits for the second event."""
        return _elapsed(self.torch_device)

    def profiler_activities(self) -> Sequence[Any]:
        """CPU and CUDA activity."""
        return [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Dense matrix FLOP/s with fp32 accumulation. For float32 the TF32 rate when PyTorch may use TF32."""
        peak = peak_of(torch.cuda.get_device_name(self.torch_device))
        if peak is None:
            return None
        name = str(dtype).removeprefix("torch.")
        if name == "float32" and torch.get_float32_matmul_precision() != "highest":
            name = "tf32"
        return peak.flops.get(name)

    def peak_bandwidth(self) -> float | None:
        """Bytes/s of the GPU's memory."""
        peak = peak_of(torch.cuda.get_device_name(self.torch_device))
        return peak.bandwidth if peak is not None else None

    def fused_ops(self) -> frozenset[str]:
        """`adamw`: `torch.optim.AdamW(fused=True)`."""
        return frozenset({"adamw"})


@contextmanager
def _elapsed(device: torch.device) -> Iterator[Callable[[], float]]:
    stream = torch.cuda.current_stream(device)
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    finished = False

    def seconds() -> float:
        assert finished, "elapsed: ask for the seconds after the block"
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    start.record(stream)
    try:
        yield seconds
    finally:
        end.record(stream)
        finished = True
