"""Starting vLLM inside a training process, and ending it there, without disturbing the process."""

from __future__ import annotations

import gc
import logging
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from mmrl_core.contracts import DeviceOps
from mmrl_core.errors import RolloutError

log = logging.getLogger("mmrl.rollout")

_REQUIRED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""The engine runs in this process: weights need no copy between processes, and ranks stay what the launcher made."""
_PREFERRED = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
"""Unless the environment says otherwise. As warnings vLLM tells things that are as they should be here: that it has no
tokenizer, that positions are no weights."""
_running: set[int] = set()
"""Engines that have been started and not stopped."""


def start(arguments: Mapping[str, Any], device: DeviceOps, *, what: str) -> Any:
    """vLLM's `LLM` with these arguments. Raises RolloutError, with `what` the engine was to run."""
    _set_environment()
    with process_kept(device):
        try:
            import vllm
        except ImportError as error:
            raise RolloutError(f"rollout: vllm: vLLM cannot be imported: {error}. See docs/how-to/vllm.md") from error
        try:
            llm = vllm.LLM(**arguments)
        except (ValueError, RuntimeError, OSError, NotImplementedError, ImportError) as error:
            raise RolloutError(
                f"rollout: vllm {vllm.__version__} cannot run {what}: {type(error).__name__}: {error}\n"
                "When memory is short: lower rollout.max_model_len, rollout.max_num_seqs or rollout.kv_cache_mb; "
                "rollout.memory_fraction counts what is already in use on the device"
            ) from error
    # collected or at exit, the engine would leave torch.distributed, which belongs to the run: `stop` does not
    finalizer = getattr(llm.llm_engine.engine_core, "_finalizer", None)
    if finalizer is not None:
        finalizer.detach()
    _running.add(id(llm))
    return llm


def stop(llm: Any) -> None:
    """End an engine and give its memory back. The process group is the run's and stays."""
    core = llm.llm_engine.engine_core.engine_core
    core.model_executor.shutdown()
    core.scheduler.shutdown()
    gc.unfreeze()
    _running.discard(id(llm))
    if not _running:
        _forget_groups()


def sleep_is_possible() -> bool:
    """Whether this platform's vLLM can give memory back and take it again."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_sleep_mode_available())


def _forget_groups() -> None:
    """vLLM keeps the groups of ranks that it made for the next engine; they end with the process group that they are
    parts of, and the next one may come in another."""
    from vllm.distributed import parallel_state

    parallel_state.destroy_model_parallel()
    world = parallel_state._WORLD
    if world is not None:
        world.destroy()
        parallel_state._WORLD = None


def _set_environment() -> None:
    for name, value in _REQUIRED.items():
        if os.environ.get(name, value) != value:
            log.warning(
                "%s=%s is set to %s: the engine runs inside the training process", name, os.environ[name], value
            )
        os.environ[name] = value
    for name, value in _PREFERRED.items():
        os.environ.setdefault(name, value)


@contextmanager
def process_kept(device: DeviceOps) -> Iterator[None]:
    """Within the block vLLM seeds generators and draws from them, although every sample has its own, and makes
    torch.set_num_threads do nothing on a CPU.

    Afterwards all is as it was, so that training goes on as with any other engine, resumed or not.
    """
    python, numpy, cpu, own = random.getstate(), np.random.get_state(), torch.get_rng_state(), device.rng_state()
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        device.set_rng_state(own)
        torch.set_num_threads = set_num_threads
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
