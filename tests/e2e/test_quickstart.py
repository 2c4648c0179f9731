"""The main job on real input: SmolLM2-135M-Instruct learns sums, and the control does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


def mmrl(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "mmrl_core.cli.main", *arguments],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def scores(folder: Path, run: str) -> list[float]:
    lines = (folder / "runs" / run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["grpo/score/mean"] for line in lines]


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(2700)
def test_the_quickstart_learns_and_the_control_does_not(tmp_path: Path) -> None:
    out = mmrl(tmp_path, "train", str(RECIPE))
    assert "run finished" in out
    rewards = scores(tmp_path, "quickstart")
    assert len(rewards) == 30
    rise = sum(rewards[-5:]) / 5 - sum(rewards[:5]) / 5
    assert rise >= 0.25, rewards
    out = mmrl(tmp_path, "eval", str(RECIPE), "--output", "eval.json")
    assert "sign test" in out
    report = json.loads((tmp_path / "eval.json").read_text())
    assert report["models"][0]["prompts"] >= 200
    assert report["paired"]["difference"] >= 0.15
    assert report["paired"]["p_value"] < 0.01
    held_out = set(report["questions"])
    assert len(held_out) == len(report["questions"])
    assert not held_out & drawn_questions(), "training drew a held-out question"
    control = ["algorithm.shuffle_rewards=true", "run_dir=runs/control", "checkpoint.export=false"]
    mmrl(tmp_path, "train", str(RECIPE), *control, "algorithm.steps=12")
    shuffled = scores(tmp_path, "control")
    assert sum(shuffled[-5:]) / 5 - sum(shuffled[:5]) / 5 < 0.1, shuffled
    assert sum(shuffled[-5:]) / 5 < sum(rewards[7:12]) / 5, "as many steps with true rewards do better"


def drawn_questions() -> set[str]:
    """Every question that the recipe's training source can draw."""
    from mmrl_core.data.arithmetic import ArithmeticSource
    from mmrl_core.plugins import resolve
    from mmrl_core.recipe import load_recipe

    recipe, source = load_recipe(RECIPE)
    prompts = ArithmeticSource(resolve(recipe, source).data.options, recipe.seed)
    prompts.prepare()
    return {prompts.prompt(i).question() for i in range(len(prompts))}
