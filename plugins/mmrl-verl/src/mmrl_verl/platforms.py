"""Telling verl which device this process computes on, before its engines are imported: they ask once."""

from __future__ import annotations

import os
import sys
from typing import Any

from mmrl_core.errors import BackendError
from mmrl_verl.importing import import_verl

ENGINE_MODULE = "verl.workers.engine.fsdp.transformer_impl"


def choose(device: str) -> None:
    """Make verl compute on `device` (`cpu`, or an accelerator that verl finds by itself) in this process.

    Raises:
        BackendError: verl's engines were imported for another device, or verl sees no such device.
    """
    import_verl()
    from verl.plugin.platform import get_platform, platform_manager, set_platform

    loaded = sys.modules.get(ENGINE_MODULE)
    if loaded is not None and loaded.device_name != device:
        raise BackendError(
            f"verl's engines were imported in this process for {loaded.device_name}, and the recipe's device is "
            f"{device}. Start a process of its own for each device, or set VERL_PLATFORM"
        )
    if device == "cpu":
        from mmrl_verl.platform_cpu import PlatformCpu

        if not isinstance(platform_manager._current_platform, PlatformCpu):
            platform_manager._current_platform = None  # a guess, made before anybody said what is meant
            set_platform(PlatformCpu())
        return
    found = get_platform().device_name
    if found != device:
        raise BackendError(
            f"verl takes this machine for {found!r} (VERL_PLATFORM={os.environ.get('VERL_PLATFORM', '')!r}), and the "
            f"recipe's device is {device}; set VERL_PLATFORM to verl's name of its vendor, such as nvidia or huawei"
        )


def engine_class(backend: str) -> Any:
    """verl's engine for language models of this name, for the device chosen before.

    Raises BackendError when verl has none here.
    """
    from verl.utils.device import get_device_name
    from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead

    engines: dict[Any, Any] = EngineRegistry._engines["language_model"].get(backend, {})
    if backend == "fsdp2" and "cpu" not in engines:
        # nothing in it is tied to an accelerator; verl only lists those that its authors run on
        EngineRegistry.register("language_model", [backend], device=["cpu"])(FSDPEngineWithLMHead)
    try:
        return EngineRegistry.get_engine_cls("language_model", backend)
    except (AssertionError, ValueError) as error:
        raise BackendError(f"verl has no engine {backend} for {get_device_name()} here: {error}") from error
