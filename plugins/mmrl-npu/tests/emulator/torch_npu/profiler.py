"""The vendor's profiler by the names that are used of it: torch's, which sees the host, written to the same place."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch


class ProfilerActivity:
    CPU, NPU = 0, 1


class ProfilerLevel:
    Level0, Level1, Level2 = "Level0", "Level1", "Level2"


class AiCMetrics:
    PipeUtilization, AiCoreNone = "ACL_AICORE_PIPE_UTILIZATION", "ACL_AICORE_NONE"


class ExportType:
    Text, Db = "text", "db"


class _ExperimentalConfig:
    def __init__(self, profiler_level: str, aic_metrics: str, export_type: str) -> None:
        assert profiler_level.startswith("Level")
        assert aic_metrics.startswith("ACL_AICORE_")
        assert export_type in ("text", "db")
        assert (profiler_level == "Level0") == (aic_metrics == "ACL_AICORE_NONE")


def tensorboard_trace_handler(
    dir_name: str, worker_name: str, analyse_flag: bool = True
) -> Callable[[torch.profiler.profile], None]:
    """Writes `WORKER_PID_ascend_pt/ASCEND_PROFILER_OUTPUT/trace_view.json`."""
    assert analyse_flag

    def handler(profiler: torch.profiler.profile) -> None:
        output = Path(dir_name) / f"{worker_name}_{os.getpid()}_ascend_pt" / "ASCEND_PROFILER_OUTPUT"
        output.mkdir(parents=True)
        profiler.export_chrome_trace(str(output / "trace_view.json"))

    return handler


def profile(
    *, activities: Collection[int], on_trace_ready: Callable[..., Any], experimental_config: _ExperimentalConfig
) -> torch.profiler.profile:
    assert set(activities) == {ProfilerActivity.CPU, ProfilerActivity.NPU}
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], on_trace_ready=on_trace_ready)
