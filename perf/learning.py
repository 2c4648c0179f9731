"""Do the quickstarts learn? Three seeds, held-out scores before and after, and a control that must not learn.

    python perf/learning.py                   # the text quickstart
    python perf/learning.py --job image       # the image quickstart
    python perf/learning.py [--seeds 0 1 2] [--steps N] [--out runs/learning]

Runs the real commands (`mmrl train`, `mmrl eval`) and prints one row a run. Exit status 1 when a bar is missed.

text: the training reward of the last 5 steps at least 0.25 above the first 5, the held-out reward up by at least 0.15
with p < 0.01 (paired), and for the control (rewards permuted within each group) no rise of the training reward above
0.1. image, on held-out noise: the reward up by at least 0.5 and the judge, which was not trained on, by at least 0.4,
each in less than 240 seconds; the first from an empty model cache, so that its time has the making of the model in it.
For the control no rise of either above 0.1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).parents[1] / "recipes"
TEXT, IMAGE = RECIPES / "quickstart.yaml", RECIPES / "quickstart_image.yaml"
RISE, HELD_OUT, P_VALUE, CONTROL = 0.25, 0.15, 0.01, 0.1
REWARD, JUDGE, SECONDS = 0.5, 0.4, 240.0
SHUFFLED = ("algorithm.shuffle_rewards=true", "checkpoint.export=false")


def mmrl(*arguments: str, **environment: str) -> None:
    """One command; its output goes to our stderr."""
    command = [sys.executable, "-m", "mmrl_core.cli.main", *arguments]
    subprocess.run(command, stdout=sys.stderr, env={**os.environ, **environment}, check=True)


# ----------------------------------------------------------------------------------------------------------------- text


def rewards(run: Path) -> tuple[float, float]:
    """Mean training reward of the first and the last 5 steps."""
    rows = [json.loads(line)["grpo/score/mean"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return sum(rows[:5]) / 5, sum(rows[-5:]) / 5


def text(seeds: Sequence[int], steps: int, out: Path) -> int:
    """Print the table; returns how many runs missed their bar."""
    missed = 0
    shared = [f"algorithm.steps={steps}", "writers=[console, jsonl]"]
    print(f"{'run':<10} {'first 5':>8} {'last 5':>8} {'rise':>7}   held-out before -> after (paired)")
    for seed in seeds:
        run = out / f"seed{seed}"
        overrides = [f"run_dir={run}", f"seed={seed}", *shared]
        mmrl("train", str(TEXT), *overrides)
        mmrl("eval", str(TEXT), *overrides, "--output", str(run / "eval.json"))
        first, last = rewards(run)
        report = json.loads((run / "eval.json").read_text())
        before, after = (m["score"] for m in report["models"])
        p = report["paired"]["p_value"]
        good = last - first >= RISE and after - before >= HELD_OUT and p < P_VALUE
        missed += not good
        print(
            f"seed {seed:<5} {first:8.3f} {last:8.3f} {last - first:+7.3f}   {before:.3f} -> {after:.3f} "
            f"({after - before:+.3f}, p = {p:.1e}, {report['models'][0]['prompts']} questions)"
            f"{'' if good else '   MISSED'}",
            flush=True,
        )
    run = out / "control"
    mmrl("train", str(TEXT), f"run_dir={run}", *shared, *SHUFFLED)
    first, last = rewards(run)
    good = last - first < CONTROL
    missed += not good
    print(f"{'control':<10} {first:8.3f} {last:8.3f} {last - first:+7.3f}   {'' if good else 'MISSED'}")
    return missed


# ---------------------------------------------------------------------------------------------------------------- image


def image(seeds: Sequence[int], steps: int, out: Path) -> int:
    """Print the table; returns how many runs missed their bar."""
    missed = 0
    shared = [f"algorithm.steps={steps}", f"eval.every={max(1, steps // 5)}", "writers=[console, jsonl, images]"]
    print(f"{'run':<10} {'reward before -> after':<26} {'judge before -> after':<26} {'seconds':>8}")
    with tempfile.TemporaryDirectory(prefix="mmrl-learning-") as cache:
        for name, overrides in [(f"seed {seed}", [f"seed={seed}"]) for seed in seeds] + [("control", list(SHUFFLED))]:
            run = out / name.replace(" ", "")
            started = time.perf_counter()
            mmrl("train", str(IMAGE), f"run_dir={run}", *shared, *overrides, MMRL_CACHE=cache)
            seconds = time.perf_counter() - started
            found = json.loads((run / "summary.json").read_text())["eval"]
            shown, (reward, judge) = _rises(found)
            if name == "control":
                good = max(reward, judge) < CONTROL
            else:
                good = reward >= REWARD and judge >= JUDGE and seconds < SECONDS
            missed += not good
            print(f"{name:<10} {shown} {seconds:8.0f}{'' if good else '   MISSED'}", flush=True)
    return missed


def _rises(found: dict[str, Any]) -> tuple[str, tuple[float, float]]:
    """Two columns of the table, and how far reward and judge rose."""
    pairs = [(found["first"]["rewards"][name], found["rewards"][name]) for name in ("digits", "digits_judge")]
    shown = " ".join(f"{f'{old:.3f} -> {new:.3f} ({new - old:+.3f})':<26}" for old, new in pairs)
    return shown, (pairs[0][1] - pairs[0][0], pairs[1][1] - pairs[1][0])


def main() -> int:
    """Run one job; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=["text", "image"], default="text", help="which quickstart")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="30 for text and 100 for image, which is what the bars are for")
    parser.add_argument("--out", type=Path, help="runs/learning for text, runs/learning_image for image")
    options = parser.parse_args()
    if options.job == "text":
        missed = text(options.seeds, options.steps or 30, options.out or Path("runs/learning"))
    else:
        missed = image(options.seeds, options.steps or 100, options.out or Path("runs/learning_image"))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
