"""The memory of an update does not grow with the number of denoising steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "perf" / "flow_memory.py"
FEW, MANY = 8, 32
"""Denoising steps; all but the last are trained."""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_memory_does_not_grow_with_steps() -> None:
    """Steps are differentiated one by one, so the activations of one are alive at a time.

    What may grow are the recorded states (4 kB a row and step here, stacked once) and the allocator's fragments. A
    tenth of the activations of the extra steps leaves room for those, and is ten times less than what keeping the
    graphs would add. That the measurement sees graphs that are kept is shown by differentiating all steps at once.
    """
    done = subprocess.run([sys.executable, str(SCRIPT), "--json"], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout)
    one_step = (peaks["unsliced"] - peaks["few"]) / (FEW - 2)  # 7 steps' activations against 1's
    # what backward needs of a block and token, at least: qkv, the two normalised inputs, and the perceptron's hidden
    # layer before and after its activation: 3 + 2 + 4 + 4 times the width of 64, fp32; 2 blocks, 256 tokens, 8 rows
    assert one_step > 13 * 64 * 4 * 2 * 256 * 8, f"{one_step / 1e6:.1f} MB a step: unsliced replay was not seen"
    assert peaks["many"] - peaks["few"] < 0.1 * (MANY - FEW) * one_step, peaks
