"""`torch.npu` of the emulated device: the names that programs use of the vendor's."""

from __future__ import annotations

import atexit
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from torch_npu import _device, fused

MEMORY = 64 << 30
Place = Any
"""A number, a torch device, its name, or None for the current device."""


def _index(place: Place) -> int:
    if place is None:
        return current_device()
    if isinstance(place, int):
        return place
    index = torch.device(place).index
    return current_device() if index is None else index


def is_available() -> bool:
    return device_count() > 0


def is_initialized() -> bool:
    return True


def init() -> None: ...


def _is_in_bad_fork() -> bool:
    return False


def _lazy_init() -> None: ...


def device_count() -> int:
    count: int = _device.device_count()
    return count


def current_device() -> int:
    index: int = _device.current_device()
    return index


def set_device(place: Place) -> None:
    _device.set_device(_index(place))


@contextmanager
def device(place: Place) -> Iterator[None]:
    before = current_device()
    set_device(place)
    try:
        yield
    finally:
        set_device(before)


def synchronize(place: Place = None) -> None:
    _index(place)


# ------------------------------------------------------------------------------------------------------------- memory


class Properties:
    name = "Ascend-emulated"
    total_memory = MEMORY


def get_device_properties(place: Place = None) -> Properties:
    return Properties()


def get_device_name(place: Place = None) -> str:
    return Properties.name


def memory_allocated(place: Place = None) -> int:
    held: int = _device.memory_allocated(_index(place))
    return held


def max_memory_allocated(place: Place = None) -> int:
    held: int = _device.max_memory_allocated(_index(place))
    return held


memory_reserved, max_memory_reserved = memory_allocated, max_memory_allocated


def mem_get_info(place: Place = None) -> tuple[int, int]:
    return MEMORY - memory_allocated(place), MEMORY


def reset_peak_memory_stats(place: Place = None) -> None:
    _device.reset_peak(_index(place))


def empty_cache() -> None: ...


# ----------------------------------------------------------------------------------------------------- random numbers


def manual_seed(seed: int) -> None:
    _device.default_generator(current_device()).manual_seed(int(seed))


def manual_seed_all(seed: int) -> None:
    for index in range(device_count()):
        _device.default_generator(index).manual_seed(int(seed))


def get_rng_state(place: Place = None) -> torch.Tensor:
    state: torch.Tensor = _device.default_generator(_index(place)).get_state()
    return state


def set_rng_state(state: torch.Tensor, place: Place = None) -> None:
    _device.default_generator(_index(place)).set_state(state)


# -------------------------------------------------------------------------------------------------- streams and events


Event = torch.Event
Stream = torch.Stream


def current_stream(place: Place = None) -> torch.Stream:
    return torch.Stream(device=f"npu:{_index(place)}")


default_stream = current_stream


@contextmanager
def stream(which: torch.Stream) -> Iterator[None]:
    yield


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.float16, torch.bfloat16]


def is_bf16_supported(including_emulation: bool = False) -> bool:
    return True


# ---------------------------------------------------------------------------------------------------------- installing


def install() -> None:
    """Make this module `torch.npu`, register the collectives, and do what the variables ask."""
    module = sys.modules[__name__]
    torch._register_device_module("npu", module)
    sys.modules["torch.npu"] = module
    torch.utils.generate_methods_for_privateuse1_backend()
    torch.distributed.Backend.register_backend("hccl", _hccl, devices=["npu"])
    for word in filter(None, os.environ.get("NPU_EMULATOR_REFUSE", "").split(",")):
        if "::" in word:
            _device.refuse_operator(word)
        else:
            _device.refuse_type(getattr(torch, word))
    log = os.environ.get("NPU_EMULATOR_LOG")
    if log:
        atexit.register(_write_log, Path(log))


def _hccl(store: Any, rank: int, size: int, timeout: Any) -> Any:
    return _device.hccl_over(torch.distributed.ProcessGroupGloo(store, rank, size, timeout))


def _write_log(folder: Path) -> None:
    ran = [*_device.calls(), *(f"npu::{name}" for name in fused.CALLS)]
    (folder / f"{os.getpid()}.json").write_text(json.dumps(sorted(ran)), encoding="utf-8")
