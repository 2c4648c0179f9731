"""The device puts its patches in force and takes them back, on the emulated NPU: values, gradients and wiring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import emulated_runs
import pytest
from mmrl_npu.patches import NAMES
from npu_tiny_networks import FAMILIES

TOLERANCE = 1e-5
LIBRARYS_OWN = {"sd3": {"npu_rms_norm": 8}}
"""Operators that diffusers runs by itself wherever torch_npu can be imported: on the CPU too."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `npu_emulated_patches.py` found."""
    emulated_runs.require_emulator()
    program = Path(__file__).with_name("npu_emulated_patches.py")
    done = emulated_runs.python(str(program), cwd=tmp_path_factory.mktemp("emulated"))
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["device"] == "npu:0"
    assert found["patches"] == list(NAMES)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_patched_on_the_device_as_unpatched_on_the_cpu(name: str, results: dict[str, Any]) -> None:
    """Forward and backward, with the operators as documented."""
    case = results[name]
    assert case["patched"] < TOLERANCE
    assert case["operators"] == {**FAMILIES[name].all, **LIBRARYS_OWN.get(name, {})}
    assert case["reverted"] < TOLERANCE
    assert case["operators reverted"] == LIBRARYS_OWN.get(name, {})


def test_a_patched_run_learns_what_the_cpu_does(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Two GRPO steps of a language model through `mmrl train`, with the patches that are on by default."""
    emulated_runs.require_emulator()
    workshop = emulated_runs.Workshop.make(tmp_path_factory.mktemp("workshop"))
    start = emulated_runs.weights(workshop.folder / "lm")
    expected = emulated_runs.weights(workshop.train("text", "cpu", "device=cpu") / "export")
    run = workshop.train("text", "patched", "device=npu")
    found = emulated_runs.weights(run / "export")
    assert found.keys() == expected.keys() == start.keys()
    assert 0 < emulated_runs.difference(found, expected, start) < TOLERANCE
    assert "patches in force: transformers-rms-norm, transformers-swiglu, transformers-rotary" in (
        (run / "run.log").read_text(encoding="utf-8")
    )
