"""`mmrl verify` of `verl-fsdp2` against `fsdp2`: log-probs, entropy, gradients, and ten steps of two updates."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import pytest

from mmrl_core.cli import main as cli
from mmrl_core.testing.tiny import tiny_language_model, tiny_recipe, write_recipe_file

Family = Literal["llama", "qwen2"]
STEPS = "10"

DRIVER = """
import json, sys
from mmrl_core.cli.main import main

if __name__ == "__main__":
    for name, arguments in json.loads(sys.argv[1]).items():
        status = main(["verify", "recipe.yaml", *arguments, "--record", name])
        assert status == 0, (name, status)
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in `folder`, until it ends."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**clean, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )


def recorded(folder: Path, family: Family, *, tied: bool, jobs: Mapping[str, Sequence[str]]) -> None:
    """A record of fsdp2 and, on its batch, one of each job, in `folder`."""
    tiny_language_model(folder / "model", architecture=family, tie_word_embeddings=tied)
    recipe = tiny_recipe(
        folder / "model",
        folder / "run",
        algorithm={"prompts_per_step": 3, "samples_per_prompt": 2, "kl": {"coef": 0.01}},
        sampling={"temperature": 0.8, "max_new_tokens": 7},
    )
    write_recipe_file(folder / "recipe.yaml", recipe)
    (folder / "driver.py").write_text(DRIVER)
    common = ["--updates", STEPS]
    named = {"fsdp2": ["--synthetic-advantages", *common]}
    named |= {name: [*job, "--rollouts", "fsdp2", *common] for name, job in jobs.items()}
    done = run(folder, "driver.py", json.dumps(named))
    assert done.returncode == 0, done.stdout + done.stderr


TWO = ["backend.micro_batch_samples=2", "backend.remove_padding=true", "launcher.processes=2"]


@pytest.mark.parametrize(("family", "tied", "changes"), [("llama", True, TWO), ("qwen2", False, [])])
def test_equal_to_fsdp2(
    tmp_path: Path,
    family: Family,
    tied: bool,
    changes: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """fp32, on one rank and on two, tied and not."""
    recorded(tmp_path, family, tied=tied, jobs={"verl": ["backend=verl-fsdp2", *changes]})
    status = cli.main(["verify", "--compare", str(tmp_path / "verl"), str(tmp_path / "fsdp2")])
    assert status == 0, capsys.readouterr()
