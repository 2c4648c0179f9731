"""The conformance kit on the built-in devices, prompt sources, launchers and writers."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from mmrl_core.metrics.jsonl import read_metrics
from mmrl_core.testing.devices import DeviceConformance
from mmrl_core.testing.launchers import LauncherConformance
from mmrl_core.testing.prompt_sources import PromptSourceConformance
from mmrl_core.testing.writers import WriterConformance


class TestCpu(DeviceConformance):
    component = "cpu"


class TestCuda(DeviceConformance):
    component = "cuda"


class TestArithmetic(PromptSourceConformance):
    component = "arithmetic"
    options: ClassVar[Mapping[str, Any]] = {"operations": ["+", "-"], "largest": 5}


class TestReasoningGymSource(PromptSourceConformance):
    component = "reasoning_gym"
    options: ClassVar[Mapping[str, Any]] = {"dataset": "chain_sum", "size": 20}


ROWS = [{"prompt": f"What is {n} + {n}?", "answer": str(2 * n), "level": n % 3} for n in range(17)]


class TestJsonl(PromptSourceConformance):
    component = "jsonl"

    @classmethod
    def make_options(cls, folder: Path) -> Mapping[str, Any]:
        for name, rows in (("a", ROWS[:10]), ("b", ROWS[10:])):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"path": str(folder / "*.jsonl"), "skip": 2}


class TestJsonlInFileOrder(PromptSourceConformance):
    component = "jsonl"
    shuffles = False

    @classmethod
    def make_options(cls, folder: Path) -> Mapping[str, Any]:
        (folder / "data.json").write_text(json.dumps(ROWS))
        return {"path": str(folder / "data.json"), "shuffle": False, "template": "qwen_r1"}


class TestParquet(PromptSourceConformance):
    component = "parquet"

    @classmethod
    def make_options(cls, folder: Path) -> Mapping[str, Any]:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "data.parquet")
        return {"path": str(folder / "data.parquet"), "limit": 15}


class TestLocal(LauncherConformance):
    component = "local"
    options: ClassVar[Mapping[str, Any]] = {"processes": 2}


class TestTorchrun(LauncherConformance):
    component = "torchrun"
    command = (
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("--no-python", sys.executable, "-m", "mmrl_core.cli.main", "train"),
    )


class TestConsole(WriterConformance):
    component = "console"
    options: ClassVar[Mapping[str, Any]] = {"samples": 3}


class TestJsonlWriter(WriterConformance):
    component = "jsonl"

    @classmethod
    def steps_written(cls, run_dir: Path) -> Sequence[int] | None:
        return [row["step"] for row in read_metrics(run_dir / "metrics.jsonl")]


class TestTensorboard(WriterConformance):
    component = "tensorboard"

    @classmethod
    def steps_written(cls, run_dir: Path) -> Sequence[int] | None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(run_dir / "tensorboard"))
        events.Reload()
        return [event.step for event in events.Scalars("grpo/score/mean")]


class TestWandb(WriterConformance):
    component = "wandb"
    options: ClassVar[Mapping[str, Any]] = {"mode": "offline"}
