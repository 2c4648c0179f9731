"""Peak memory of an update of the policy `flow`, by number of denoising steps. Linux.

    python perf/flow_memory.py                              # 8 and 32 steps, one at a time, and 8 all at once
    python perf/flow_memory.py --one --steps 8 --at-once 1  # one measurement, in bytes

Each measurement is a process of its own: what the allocator keeps of an earlier one would hide the next. Reported is
how far the highest resident size during `update` is above the resident size before it. The network is shallow with
many tokens, so that activations outweigh weights, gradients and optimizer state.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

FEW, MANY = 8, 32
"""Denoising steps that are compared."""
SIZE, ROWS = 32, 8
CONFIG = {"sample_size": SIZE, "patch_size": 2, "width": 64, "depth": 2, "heads": 2}


def main() -> int:
    """Print a table, or the one measurement that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print bytes instead of the table")
    parser.add_argument("--one", action="store_true", help="measure --steps and --at-once in this process")
    parser.add_argument("--steps", type=int, default=8, help="denoising steps, of which all but the last are trained")
    parser.add_argument("--at-once", type=int, default=1, help="steps in one forward and backward (steps_at_once)")
    arguments = parser.parse_args()
    if arguments.one:
        with tempfile.TemporaryDirectory(prefix="mmrl-memory-") as scratch:
            print(measure(Path(scratch), arguments.steps, arguments.at_once))
        return 0
    few, many, unsliced = together((FEW, 1), (MANY, 1), (FEW, FEW - 1))
    if arguments.json:
        print(json.dumps({"few": few, "many": many, "unsliced": unsliced}))
        return 0
    one_step, more = (unsliced - few) / (FEW - 2), MANY - FEW
    print("peak of an update above what was resident before it:")
    for what, peak in (
        (f"{FEW} steps, one at a time", few),
        (f"{MANY} steps, one at a time", many),
        (f"{FEW} steps, {FEW - 1} at once", unsliced),
    ):
        print(f"  {what:25s} {peak / 1e6:7.1f} MB")
    print(f"activations of one step: {one_step / 1e6:.1f} MB")
    share = (many - few) / (more * one_step)
    print(f"{more} more steps add {(many - few) / 1e6:.1f} MB, {share:.1%} of their activations")
    return 0


def together(*jobs: tuple[int, int]) -> list[int]:
    """Bytes of each (steps, at once), measured in processes side by side."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    processes = []
    for steps, at_once in jobs:
        command = [sys.executable, __file__, "--one", "--steps", str(steps), "--at-once", str(at_once)]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"a measurement failed; what the others printed: {outputs}")
    return [int(output.splitlines()[-1]) for output in outputs]


def measure(folder: Path, steps: int, at_once: int) -> int:
    """Bytes that one update needs at its highest, in this process."""
    from flow_rig import dit_folder, flow_recipe
    from rig import built_run, requests

    from mmrl_core.grpo.losses import build_loss
    from mmrl_core.testing.denoising import check_minibatch

    values = flow_recipe(dit_folder(folder / "model", **CONFIG), folder)
    values["model"]["policy"]["steps_at_once"] = at_once
    values["sampling"] |= {"steps": steps, "height": SIZE, "width": SIZE, "trained_fraction": 1.0}
    values["algorithm"] |= {"prompts_per_step": 2, "samples_per_prompt": ROWS // 2}
    with built_run(values, folder) as run:
        minibatch = check_minibatch(run.engine.generate(requests(run), run.sampling))
        loss = build_loss(run.recipe.algorithm)
        before = status("VmRSS")
        forget_peak()
        run.backend.update(minibatch, loss)
        return status("VmHWM") - before


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}")


def forget_peak() -> None:
    """Set VmHWM to VmRSS (proc(5), clear_refs 5): importing and the rollout have peaks of their own."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
