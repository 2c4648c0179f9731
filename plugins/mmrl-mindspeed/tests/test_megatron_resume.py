"""`mmrl train` with the backend `megatron`, killed and resumed: in the same layout, and in another one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from mmrl_core.metrics.names import reproducible
from mmrl_core.testing.tiny import tiny_language_model, tiny_recipe, write_recipe_file

STEPS = 4
TP2 = "backend={name: megatron, tensor_parallel: 2, sequence_parallel: true}"
PP2 = "backend={name: megatron, pipeline_parallel: 2}"


@dataclass(frozen=True)
class Bench:
    folder: Path

    def command(self, run: str, *overrides: str) -> list[str]:
        return [sys.executable, "-m", "mmrl_core.cli.main", "train", "recipe.json", f"run_dir={run}", *overrides]

    def environment(self) -> dict[str, str]:
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MMRL_PLUGINS")}
        return {**env, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}

    def train(self, run: str, *overrides: str) -> str:
        done = subprocess.run(
            self.command(run, *overrides),
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=500,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def metrics(self, run: str) -> list[dict[str, Any]]:
        lines = (self.folder / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def weights(self, run: str) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return dict(load_file(self.folder / run / "export" / "model.safetensors"))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A recipe on two ranks, and a run of it that nothing disturbed."""
    folder = tmp_path_factory.mktemp("resume")
    model = tiny_language_model(folder / "model", end_tokens="abcdefghijklmnopqrstuvwxyz0123456789")
    recipe = tiny_recipe(
        model,
        folder / "run",
        launcher={"name": "local", "processes": 2},
        sampling={"max_new_tokens": 6},
        rewards=[
            {"name": "numeric", "run": "inline", "format_weight": 0.25},
            {"name": "length", "run": "inline", "maximum": 1, "ramp": 5, "weight": 0.5},
        ],
        algorithm={"steps": STEPS, "prompts_per_step": 3, "minibatches": 2, "epochs": 2},
        checkpoint={"every": 1, "export": True},
        writers=["console", "jsonl"],
    )
    write_recipe_file(folder / "recipe.json", recipe)
    bench = Bench(folder)
    bench.train("undisturbed", TP2)
    return bench


def killed(bench: Bench, run: str) -> None:
    """Start a run and kill it, ranks included, after its second step."""
    process = subprocess.Popen(
        bench.command(run, TP2),
        cwd=bench.folder,
        env=bench.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    assert any(f"step 2/{STEPS}" in line for line in process.stdout)
    ranks = psutil.Process(process.pid).children(recursive=True)
    for victim in (*ranks, process):
        victim.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(ranks, timeout=20)
    assert len(bench.metrics(run)) < STEPS


def test_killed_and_resumed_is_undisturbed(bench: Bench) -> None:
    killed(bench, "killed")
    assert "resuming after step" in bench.train("killed", TP2)
    want, got = bench.metrics("undisturbed"), bench.metrics("killed")
    assert [reproducible(row) for row in got] == [reproducible(row) for row in want]
    a, b = bench.weights("undisturbed"), bench.weights("killed")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_killed_and_resumed_in_another_layout(bench: Bench) -> None:
    killed(bench, "moved")
    assert "resuming after step" in bench.train("moved", PP2)
    for want, got in zip(bench.metrics("undisturbed"), bench.metrics("moved"), strict=True):
        assert got["grpo/score/mean"] == pytest.approx(want["grpo/score/mean"], abs=1e-6), want["step"]
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-2), want["step"]
    a, b = bench.weights("undisturbed"), bench.weights("moved")
    close = [torch.isclose(a[name], b[name], rtol=1e-3, atol=1e-4).float().mean() for name in a]
    assert min(float(fraction) for fraction in close) > 0.99
