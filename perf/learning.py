"""Does the quickstart learn? Three seeds, held-out questions before and after, and a control that must not learn.

    python perf/learning.py [--seeds 0 1 2] [--steps 30] [--out runs/learning]

Runs the real commands (`mmrl train`, `mmrl eval`) and prints one row a run. Exit status 1 when a bar is missed: the
training reward of the last 5 steps at least 0.25 above the first 5, the held-out reward up by at least 0.15 with
p < 0.01 (paired), and for the control (rewards permuted within each group) no rise of the training reward above 0.1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
RISE, HELD_OUT, P_VALUE, CONTROL = 0.25, 0.15, 0.01, 0.1


def mmrl(*arguments: str) -> None:
    """One command; its output goes to our stderr."""
    subprocess.run([sys.executable, "-m", "mmrl_core.cli.main", *arguments], stdout=sys.stderr, check=True)


def rewards(run: Path) -> tuple[float, float]:
    """Mean training reward of the first and the last 5 steps."""
    rows = [json.loads(line)["grpo/score/mean"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return sum(rows[:5]) / 5, sum(rows[-5:]) / 5


def main() -> int:
    """Print the table; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    options = parser.parse_args()
    missed = 0
    print(f"{'run':<10} {'first 5':>8} {'last 5':>8} {'rise':>7}   held-out before -> after (paired)")
    for seed in options.seeds:
        run = options.out / f"seed{seed}"
        overrides = [f"run_dir={run}", f"seed={seed}", f"algorithm.steps={options.steps}", "writers=[console, jsonl]"]
        mmrl("train", str(RECIPE), *overrides)
        mmrl("eval", str(RECIPE), *overrides, "--output", str(run / "eval.json"))
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
    run = options.out / "control"
    shuffled = ["algorithm.shuffle_rewards=true", "checkpoint.export=false", "writers=[console, jsonl]"]
    mmrl("train", str(RECIPE), f"run_dir={run}", f"algorithm.steps={options.steps}", *shuffled)
    first, last = rewards(run)
    good = last - first < CONTROL
    missed += not good
    print(f"{'control':<10} {first:8.3f} {last:8.3f} {last - first:+7.3f}   {'' if good else 'MISSED'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
