"""The real torch_npu, on empty CANN libraries: the vendor's own code says which shapes and dtypes our calls give.

Nothing is computed, so this shows no numbers of an NPU; those are compared, with the operators as documented, in
`test_npu_patches.py`. Everything runs in one other process: torch_npu changes the PyTorch that imports it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import npu_stub_libraries
import npu_wheels
import pytest
from mmrl_npu.patches import DEFAULT, NAMES
from npu_tiny_networks import FAMILIES

pytestmark = [pytest.mark.slow, pytest.mark.network]

BACKWARD = {
    "npu_rms_norm": "npu_rms_norm_backward",
    "npu_swiglu": "npu_swiglu_backward",
    "npu_rotary_mul": "npu_rotary_mul_backward",
    "npu_fusion_attention": "npu_fusion_attention_grad",
    "npu_gelu": "npu_gelu_backward",
}
SHAPES = {"flux": [2, 15, 4], "sd3": [2, 4, 8, 6], "wan": [2, 4, 3, 4, 6]}
LIBRARYS_OWN = {"sd3": {"npu_rms_norm": 8}}
"""Operators that diffusers runs by itself as soon as torch_npu can be imported."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `npu_stub_program.py` found. Skipped, saying what is missing, where it cannot run."""
    for tool in ("gcc", "nm"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is missing: the empty CANN libraries cannot be built (install gcc and binutils)")
    if (platform.system(), platform.machine()) != ("Linux", "x86_64") or sys.version_info[:2] != (3, 11):
        pytest.skip("the wheel that is used is for Linux on x86-64 and Python 3.11")
    with tempfile.TemporaryDirectory(dir=tmp_path_factory.getbasetemp()) as folder:
        return look(Path(folder))


def look(folder: Path) -> dict[str, Any]:
    """Unpack, build, import and run in `folder`."""
    version = importlib.metadata.version("torch").partition("+")[0]
    wheel = npu_wheels.unpack(npu_wheels.download(version, folder), folder / "wheel")
    libraries = folder / "libraries"
    assert npu_stub_libraries.build(wheel, libraries) > 50
    cases = [f"{kind}:{name}:all" for name in FAMILIES for kind in ("network", "gradients")]
    cases += [f"network:{name}:{which}" for name in ("qwen3", "flux") for which in ("default", "none")]
    environment = {
        **os.environ,
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "LD_LIBRARY_PATH": f"{libraries}:{wheel / 'torch_npu/lib'}",
        "PYTHONPATH": os.pathsep.join([str(wheel), str(Path(__file__).parents[1] / "src")]),
    }
    program = Path(__file__).with_name("npu_stub_program.py")
    done = subprocess.run(
        [sys.executable, str(program), *cases, "optimizer", "refusals", "profiler"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    assert answer["torch_npu"].startswith(version)
    assert answer["devices"] == 1
    return answer


def npu_operators(case: dict[str, Any]) -> dict[str, int]:
    """The vendor's operators that ran, by name."""
    assert "error" not in case, case
    return {name.split(".")[1]: count for name, count in case["operators"].items() if name.startswith("npu.")}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_vendors_shapes_and_dtypes(name: str, results: dict[str, Any]) -> None:
    """With every patch: bfloat16 on the NPU, and each operator as often as in the numerical tests."""
    case = results[f"network:{name}:all"]
    expected = {**FAMILIES[name].all, **LIBRARYS_OWN.get(name, {})}
    assert npu_operators(case) == expected
    assert case["patches"] == list(NAMES)
    assert case["shape"] == SHAPES.get(name, [2, 11, 61])
    assert (case["dtype"], case["device"]) == ("torch.bfloat16", "npu:0")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_vendors_backward(name: str, results: dict[str, Any]) -> None:
    """The backward of each operator runs as often as it does, and every parameter has a gradient of its shape."""
    case = results[f"gradients:{name}:all"]
    forward = {**FAMILIES[name].all, **LIBRARYS_OWN.get(name, {})}
    backward = {BACKWARD[operator]: count for operator, count in forward.items()}
    assert npu_operators(case) == {**forward, **backward}
    assert case["wrong"] == []


@pytest.mark.parametrize("name", ["qwen3", "flux"])
def test_default_and_no_patches(name: str, results: dict[str, Any]) -> None:
    """The default set runs its own operators only; without patches none runs."""
    case = results[f"network:{name}:default"]
    assert npu_operators(case) == FAMILIES[name].default
    assert set(case["patches"]) == DEFAULT
    assert npu_operators(results[f"network:{name}:none"]) == {}


def test_fused_adamw_is_torchs_own(results: dict[str, Any]) -> None:
    """One call of the fused operator for all parameters."""
    case = results["optimizer"]
    assert "error" not in case, case
    assert case["operators"] == {"aten._fused_adamw_.default": 1}


def test_the_profiler_is_the_vendors(results: dict[str, Any]) -> None:
    """Every level: its own classes take our settings as they are; what they do not like they replace, and say so."""
    assert results["profiler"]["configured"] == [[level, level > 0] for level in (0, 1, 2)]
    assert results["profiler"]["said"] == ""


def test_wrong_calls_are_refused(results: dict[str, Any]) -> None:
    """The vendor's code would tell us."""
    assert results["refusals"]["refused"].keys() == {"keyword", "first by the declaration's name"}
