"""Ascend NPUs through `torch_npu`."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmrl_core.contracts import DeviceOps, MemoryStats
from mmrl_core.errors import DeviceError
from mmrl_core.patches import Applied
from mmrl_npu import chips, probe
from mmrl_npu.environment import DETERMINISTIC
from mmrl_npu.machine import here
from mmrl_npu.options import NpuOptions
from mmrl_npu.patches import apply_chosen

log = logging.getLogger("mmrl.npu")

_COLLECTIVES = "HCCL_DETERMINISTIC"
_REPRODUCIBLE = ("true", "strict")
"""The values under which CANN documents reproducible reductions."""


class NpuDevice(DeviceOps):
    """One NPU (on chips of two dies: one die) a rank."""

    name: ClassVar[str] = "npu"

    def __init__(self, options: NpuOptions | None = None) -> None:
        self.options = options or NpuOptions()
        self.patches: Applied | None = None
        """In force since `activate`, as the options say, until somebody reverts them."""
        self._device: torch.device | None = None
        self._set_by_us: list[str] = []

    @property
    def _npu(self) -> Any:
        """`torch.npu`. Imports torch_npu, which `import torch` has done already unless it was told not to."""
        try:
            import torch_npu  # noqa: F401
        except (ImportError, OSError, RuntimeError) as error:  # a library of CANN is missing; another accelerator
            found = probe.examine(here())
            cure = found.cure if not found.available else "see what mmrl doctor says"
            raise DeviceError(
                f"device npu: torch_npu cannot be imported: {error}. {found.reason}. Cure: {cure}"
            ) from error
        return torch.npu  # type: ignore[attr-defined]

    def activate(self, local_rank: int) -> torch.device:
        """Make NPU `local_rank` current, and put the patches in force that the options ask for. Raises PatchError when
        a library lacks what one of them replaces."""
        count = self.device_count()
        if local_rank >= count:
            visible = os.environ.get(probe.VISIBLE)
            shown = f" ({probe.VISIBLE}={visible})" if visible is not None else ""
            raise DeviceError(
                f"device npu: local rank {local_rank} needs NPU {local_rank}, but torch_npu sees {count}{shown}. Start "
                f"at most {count} ranks here, make more NPUs visible, or use device: cpu"
            )
        self._device = torch.device("npu", local_rank)
        self._npu.set_device(self._device)
        if self.patches is None:
            self.patches = apply_chosen(self.options.patches, device=self.name)
        return self._device

    @property
    def torch_device(self) -> torch.device:
        """This rank's NPU."""
        assert self._device is not None, "activate first"
        return self._device

    @property
    def process_group_backend(self) -> str:
        """HCCL for NPU tensors; gloo for the core's small CPU values."""
        return "cpu:gloo,npu:hccl"

    def device_count(self) -> int:
        """Visible NPUs."""
        return int(self._npu.device_count()) if self._npu.is_available() else 0

    def supports(self, dtype: torch.dtype) -> bool:
        """fp32, fp16, and bfloat16 where the chip has it (from Ascend 910B on). float64 is left to the host."""
        if dtype == torch.bfloat16:
            return self.device_count() > 0 and bool(self._npu.is_bf16_supported())
        return dtype in {torch.float32, torch.float16}

    def synchronize(self) -> None:
        """Wait for every stream of this rank's NPU."""
        self._npu.synchronize(self.torch_device)

    def memory(self) -> MemoryStats:
        """Bytes held by tensors, their peak, and the NPU's memory."""
        return MemoryStats(
            allocated=int(self._npu.memory_allocated(self.torch_device)),
            peak=int(self._npu.max_memory_allocated(self.torch_device)),
            total=int(self._npu.get_device_properties(self.torch_device).total_memory),
        )

    def reset_peak_memory(self) -> None:
        """Start a new peak measurement."""
        self._npu.reset_peak_memory_stats(self.torch_device)

    def empty_cache(self) -> None:
        """Return cached blocks to the driver."""
        self._npu.empty_cache()

    def rng_state(self) -> Tensor:
        """[N] uint8, on the CPU."""
        state: Tensor = self._npu.get_rng_state(self.torch_device)
        return state.cpu()

    def set_rng_state(self, state: Tensor) -> None:
        """Restore what `rng_state` returned."""
        self._npu.set_rng_state(state, self.torch_device)

    def seed(self, seed: int) -> None:
        """Seed the NPU's and the CPU's generator."""
        torch.manual_seed(seed)
        self._npu.manual_seed(seed)

    def set_deterministic(self, enabled: bool) -> None:
        """Deterministic kernels, reductions and matrix products. Call it before the first collective: HCCL reads its
        variable when it sets up a communicator. Raises DeviceError when the environment says otherwise."""
        if enabled:
            given = os.environ.get(_COLLECTIVES)
            if given is not None and given.strip().lower() not in _REPRODUCIBLE:
                raise DeviceError(
                    f"device npu: {_COLLECTIVES}={given} is not reproducible; unset it or set it to one of "
                    f"{', '.join(_REPRODUCIBLE)}"
                )
            ours = [name for name in DETERMINISTIC if name not in os.environ]
            os.environ.update({name: DETERMINISTIC[name] for name in ours})
            self._set_by_us += ours
        else:
            for name in self._set_by_us:
                os.environ.pop(name, None)
            self._set_by_us.clear()
        torch.use_deterministic_algorithms(enabled)

    def elapsed(self) -> AbstractContextManager[Callable[[], float]]:
        """Seconds between two events on the current stream. Asking for them waits for the second event."""
        return _elapsed(self._npu)

    def profiler_activities(self) -> Sequence[Any]:
        """CPU activity, and the NPU's where this PyTorch can record it. Kernels on the NPU are otherwise seen only by
        `torch_npu.profiler`, which `profile` uses."""
        known = torch.profiler.supported_activities()  # type: ignore[no-untyped-call]
        wanted = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.PrivateUse1]
        return [activity for activity in wanted if activity in known]

    @contextmanager
    def profile(self, folder: Path, name: str) -> Iterator[None]:
        """Record the block with `torch_npu.profiler` into `NAME_..._ascend_pt/` in `folder`, analysed. That profiler
        says what goes wrong and carries on; a profile that is missing afterwards is one WARNING."""
        folder.mkdir(parents=True, exist_ok=True)
        with self._profiler(folder, name):
            yield
        if not any(folder.glob(f"{name}*")):
            log.warning("torch_npu.profiler wrote no %s into %s; its own messages say why", name, folder)

    def _profiler(self, folder: Path, name: str) -> Any:
        """A `torch_npu.profiler.profile` that is not running yet."""
        vendor = importlib.import_module("torch_npu.profiler")
        level, metrics = self.options.profiler_level, vendor.AiCMetrics
        return vendor.profile(
            activities=[vendor.ProfilerActivity.CPU, vendor.ProfilerActivity.NPU],
            on_trace_ready=vendor.tensorboard_trace_handler(str(folder), worker_name=name, analyse_flag=True),
            experimental_config=vendor._ExperimentalConfig(
                profiler_level=getattr(vendor.ProfilerLevel, f"Level{level}"),
                aic_metrics=metrics.PipeUtilization if level > 0 else metrics.AiCoreNone,
                export_type=vendor.ExportType.Text,
            ),
        )

    def fused_ops(self) -> frozenset[str]:
        """`adamw`, where the options ask for it: torch-npu has a kernel for `torch.optim.AdamW(fused=True)`."""
        return frozenset({"adamw"}) if self.options.fused_adamw else frozenset()

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Dense matrix FLOP/s as CANN's own description of the chip gives them; see `mmrl_npu.chips`."""
        toolkit = here().toolkit()
        if toolkit is None:
            return None
        chip = str(self._npu.get_device_name(self.torch_device))
        return chips.peak_flops(toolkit, chip, str(dtype).removeprefix("torch."))


@contextmanager
def _elapsed(npu: Any) -> Iterator[Callable[[], float]]:
    start, end = npu.Event(enable_timing=True), npu.Event(enable_timing=True)
    finished = False

    def seconds() -> float:
        assert finished, "elapsed: ask for the seconds after the block"
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    start.record()
    try:
        yield seconds
    finally:
        end.record()
        finished = True
