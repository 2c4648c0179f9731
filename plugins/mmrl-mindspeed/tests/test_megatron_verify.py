"""`mmrl verify` on the backend `megatron`, and the Qwen2.5-7B recipe at a size that a CPU can take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from megatron_models import write_model

from mmrl_core.cli import main as cli
from mmrl_core.testing.tiny import tiny_recipe, write_recipe_file

RECIPE = Path(__file__).parents[3] / "recipes" / "qwen25_7b_deepscaler.yaml"

LAYOUTS = {
    "TP2": "{name: megatron, tensor_parallel: 2}",
    "PP2": "{name: megatron, pipeline_parallel: 2, micro_batch_groups: 2}",
    "TP2+SP": "{name: megatron, tensor_parallel: 2, sequence_parallel: true}",
    "DP2": "{name: megatron}",
}

DRIVER = """
import json, sys
from mmrl_core.cli.main import main

if __name__ == "__main__":
    for name, arguments in json.loads(sys.argv[1]).items():
        status = main(["verify", "recipe.yaml", *arguments, "--record", name])
        assert status == 0, (name, status)
"""


def environment() -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**clean, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in `folder`, until it ends."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record of fsdp2 on one rank and, on its batch, one of each layout on two."""
    folder = tmp_path_factory.mktemp("verify")
    write_model(folder / "model", "qwen2")
    recipe = tiny_recipe(
        folder / "model",
        folder / "run",
        algorithm={"prompts_per_step": 3, "samples_per_prompt": 2, "kl": {"coef": 0.01}},
        sampling={"temperature": 0.8, "max_new_tokens": 7},
    )
    write_recipe_file(folder / "recipe.yaml", recipe)
    (folder / "driver.py").write_text(DRIVER)
    jobs = {"fsdp2": ["--synthetic-advantages", "--updates", "2"]}
    for name, backend in LAYOUTS.items():
        jobs[name] = [f"backend={backend}", "launcher.processes=2", "--rollouts", "fsdp2", "--updates", "2"]
    done = run(folder, "driver.py", json.dumps(jobs))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_equal_to_fsdp2(records: Path, layout: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "--compare", str(records / layout), str(records / "fsdp2")]) == 0, capsys.readouterr()


def small(folder: Path) -> list[str]:
    """Overrides that make the recipe fit: a tiny model, four problems, short answers, fp32, two ranks."""
    write_model(folder / "model", "qwen2")
    rows = [{"problem": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(4)]
    (folder / "deepscaler.json").write_text(json.dumps(rows))
    return [
        *(str(RECIPE), "device=cpu", "model.path=model", "model.dtype=float32", "data.path=deepscaler.json"),
        *("launcher.processes=2", "backend.pipeline_parallel=1", "sampling.max_new_tokens=6", "algorithm.steps=2"),
        *("algorithm.prompts_per_step=2", "algorithm.samples_per_prompt=4", "writers=[jsonl]"),
    ]


def test_the_recipe_trains_at_a_small_size(tmp_path: Path) -> None:
    done = run(tmp_path, "-m", "mmrl_core.cli.main", "train", *small(tmp_path), "run_dir=run")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all("reward/math_17k_acc/mean" in row for row in rows)
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()


def test_the_recipe_is_equal_to_fsdp2_in_one_command(tmp_path: Path) -> None:
    """Megatron generates, through an engine with weights of its own; fsdp2 repeats it."""
    arguments = [*small(tmp_path), "--synthetic-advantages", "--against", "backend=fsdp2", "launcher.processes=1"]
    done = run(tmp_path, "-m", "mmrl_core.cli.main", "verify", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "engine hf (first)" in done.stdout
    assert "gradients" in done.stdout
