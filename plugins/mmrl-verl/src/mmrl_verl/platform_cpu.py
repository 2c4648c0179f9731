"""What verl needs to know of a machine without an accelerator: its engines then run on the CPU, over gloo.

Registered under the name `cpu` when `verl` is imported (through verl's entry points); `VERL_PLATFORM=cpu` chooses it.
It is never chosen by itself. Written against verl 0.9 (`verl.plugin.platform`).
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry


def _namespace() -> types.ModuleType:
    """`torch.cpu` with the functions of an accelerator's namespace that verl calls."""
    module = types.ModuleType("torch_cpu_for_verl")
    vars(module).update({name: getattr(torch.cpu, name) for name in dir(torch.cpu) if not name.startswith("__")})

    def nothing(*arguments: Any, **options: Any) -> None:
        """The CPU has no such thing."""

    def no_bytes(*arguments: Any, **options: Any) -> int:
        """Not measured on a CPU."""
        return 0

    module.__dict__.update(
        memory_allocated=no_bytes,
        memory_reserved=no_bytes,
        max_memory_allocated=no_bytes,
        max_memory_reserved=no_bytes,
        mem_get_info=lambda *arguments: (0, 0),
        reset_peak_memory_stats=nothing,
        empty_cache=nothing,
        ipc_collect=nothing,
        set_device=nothing,
        get_device_name=lambda *arguments: "cpu",
        get_rng_state=lambda *arguments: torch.get_rng_state(),
        set_rng_state=lambda state, *arguments: torch.set_rng_state(state),
        manual_seed=torch.manual_seed,
        manual_seed_all=torch.manual_seed,
    )
    return module


@PlatformRegistry.register(platform="cpu")
class PlatformCpu(PlatformBase):  # type: ignore[misc]
    """A machine without an accelerator."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _namespace()

    def is_available(self) -> bool:
        """Always."""
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        """Never found by itself: a machine with an accelerator has a CPU too."""
        return False

    def current_device(self) -> torch.device:
        """verl passes this to `Tensor.to`, where a number would mean an accelerator."""
        return torch.device("cpu")

    def device_count(self) -> int:
        """One."""
        return 1

    def set_device(self, device_index: int) -> None:
        """Nothing to choose."""

    def synchronize(self, device_index: int | None = None) -> None:
        """Work on a CPU is not queued."""

    def manual_seed(self, seed: int) -> None:
        """Seed torch."""
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        """Seed torch."""
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        """The CPU's allocator has none."""

    def empty_cache(self) -> None:
        """Nothing is cached."""

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        """None."""
        return None, None

    def communication_backend_name(self) -> str:
        """gloo."""
        return "gloo"

    def visible_devices_envvar(self) -> str:
        """Read by nothing here."""
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        """No profiler to tell."""
        yield

    def profiler_start(self) -> None:
        """No profiler to tell."""

    def profiler_stop(self) -> None:
        """No profiler to tell."""

    def ray_resource_name(self) -> str:
        """Ray's word for cores."""
        return "CPU"

    def ray_resource_options(self, num_gpus: float) -> dict[str, Any]:
        """As many cores as accelerators were asked for."""
        return {"num_cpus": num_gpus}

    def ray_noset_envvars(self) -> list[str]:
        """None."""
        return []

    def is_ipc_supported(self) -> bool:
        """No."""
        return False

    def cudart(self) -> None:
        """None."""
