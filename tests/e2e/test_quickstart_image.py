"""The image job on real input, from an empty model cache: a diffusion model learns to draw the digit that it is asked
for, and the control does not. A shortened run: what is learned in all 100 steps is measured by `perf/learning.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmrl_core.media.images import read_image
from mmrl_core.media.sheets import READABLE

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart_image.yaml"
STEPS, CONTROL_STEPS = 40, 30


def train(folder: Path, run: str, *overrides: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The summary's held-out part, and the metrics of each step."""
    command = [sys.executable, "-m", "mmrl_core.cli.main", "train", str(RECIPE), f"run_dir=runs/{run}", *overrides]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "MMRL_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "run finished" in done.stdout
    rows = [json.loads(line) for line in (folder / "runs" / run / "metrics.jsonl").read_text().splitlines()]
    return json.loads((folder / "runs" / run / "summary.json").read_text())["eval"], rows


def rise(held_out: dict[str, Any], reward: str) -> float:
    return float(held_out["rewards"][reward] - held_out["first"]["rewards"][reward])


def first_row(sheet: Path) -> list[Any]:
    """Four images [8, 8] of a sheet with ten: below the title, 8 pixels apart, enlarged without smoothing."""
    pixels, factor = read_image(sheet), READABLE // 8
    lefts = range(8, 8 + 4 * (READABLE + 8), READABLE + 8)
    return [pixels[32 : 32 + READABLE : factor, left : left + READABLE : factor, 0] for left in lefts]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_image_quickstart_learns_and_the_control_does_not(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    held_out, rows = train(tmp_path, "digits", f"algorithm.steps={STEPS}")
    assert len(rows) == STEPS
    assert rise(held_out, "digits") >= 0.2, held_out
    assert rise(held_out, "digits_judge") >= 0.15, held_out
    assert {name for name in rows[-1] if name.startswith("eval/")} >= {
        "eval/score/mean",
        "eval/reward/digits/mean",
        "eval/reward/digits_judge/mean",
    }
    for row in rows:
        assert row["grpo/score/mean"] == pytest.approx(row["reward/digits/mean"]), "the judge has no say"
        assert row["perf/samples_per_second"] > 0
        assert row["actor/pg_clipfrac"] > 0, "two updates per rollout: the clip binds"

    folder = tmp_path / "runs" / "digits"
    assert read_image(folder / "progress.png").std() > 10, "the picture of rewards"
    sheets = [folder / "images" / f"eval_{step:06d}.png" for step in (0, 20, 40)]
    for sheet in sheets:
        assert all(image.max() > 200 and image.min() < 30 for image in first_row(sheet)), "ink on black"
    changed = zip(first_row(sheets[0]), first_row(sheets[-1]), strict=True)
    assert not any(np.array_equal(before, after) for before, after in changed)
    together = sum(read_image(sheet).shape[1] for sheet in sheets)
    assert read_image(folder / "images" / "progress.png").shape[1] >= min(2000, together)

    shuffled = ["algorithm.shuffle_rewards=true", f"algorithm.steps={CONTROL_STEPS}", f"eval.every={CONTROL_STEPS}"]
    control, _ = train(tmp_path, "control", *shuffled, "checkpoint.export=false")
    assert control["first"] == held_out["first"], "the same model and the same noise before training"
    assert rise(control, "digits") < 0.05, control
    assert rise(control, "digits_judge") < 0.05, control
