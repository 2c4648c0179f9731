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
