"""Whole commands with `rollout: vllm`, each in processes of its own, and the memory of an update."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mmrl_vllm.probe import vllm

from mmrl_core.testing.tiny import tiny_language_model, tiny_recipe, write_recipe_file

pytestmark = pytest.mark.skipif(not vllm().available, reason=vllm().reason)

MEMORY = Path(__file__).parent / "update_memory.py"
MIB = 1 << 20


def run(*command: object, cwd: Path) -> str:
    """Its output, both streams."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=550,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm")
    values = tiny_recipe(
        tiny_language_model(folder / "model", head_dim=32),
        folder / "run",
        rollout={"name": "vllm", "kv_cache_mb": 64, "max_num_seqs": 16},
        rewards=[{"name": "length", "run": "inline", "unit": "characters", "maximum": 5, "ramp": 4}],
    )
    return write_recipe_file(folder / "recipe.yaml", values)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_training_with_it_on_one_rank(recipe: Path) -> None:
    """Two steps; in the second the engine has updated weights, and its log-probs are still the training network's."""
    output = run("-m", "mmrl_core.cli.main", "train", recipe, cwd=recipe.parent)
    steps = rows(recipe.parent / "run")
    assert len(steps) == 2
    assert steps[0]["grad_norm"] > 0
    for step in steps:
        assert 0 < step["mismatch/log_prob_diff_max"] < 5e-5
    assert "Failed to load weights" not in output


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_training_with_it_on_two_ranks(recipe: Path, tensor_parallel: int) -> None:
    """An engine on each rank, or one on both."""
    run_dir = recipe.parent / f"parallel-{tensor_parallel}"
    overrides = ("launcher.processes=2", f"rollout.tensor_parallel={tensor_parallel}", f"run_dir={run_dir}")
    run("-m", "mmrl_core.cli.main", "train", recipe, *overrides, cwd=recipe.parent)
    steps = rows(run_dir)
    assert len(steps) == 2
    for step in steps:
        assert 0 < step["mismatch/log_prob_diff_max"] < 5e-5


def test_verify_compares_it_with_the_training_network(recipe: Path) -> None:
    report = recipe.parent / "report.json"
    command = ("-m", "mmrl_core.cli.main", "verify", recipe, f"run_dir={recipe.parent / 'verified'}", "--prompts", 4)
    output = run(*command, "--synthetic-advantages", "--json", report, "--against", "rollout=hf", cwd=recipe.parent)
    assert "engine vllm (first)" in output
    text = report.read_text()
    found = json.loads(text)
    assert found["equal"] is True, output
    assert "mismatch/log_prob_diff_max" in text


def test_an_update_takes_one_bucket_and_the_largest_tensor(tmp_path: Path) -> None:
    """Anonymous memory, on a model of 300 MB in buckets of 16 MB; and nothing is left behind."""
    numbers = json.loads(run(MEMORY, tmp_path, cwd=tmp_path).splitlines()[-1])
    bound = numbers["bucket"] + numbers["largest"]
    assert numbers["model"] > 4 * bound
    assert max(numbers["peaks"]) <= bound + 8 * MIB
    assert numbers["kept"][-1] - numbers["kept"][0] < 48 * MIB
