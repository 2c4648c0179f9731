"""The device on an emulated npu: the conformance kit, text and flow runs against the CPU, resuming, refused operators.

This shows wiring: that everything which should run on the device does, and nothing needs what it has not. The emulated
device computes with the CPU's kernels; about the numbers, the speed or the memory of an Ascend chip it says nothing.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from emulated_runs import HERE, Workshop, difference, python, require_emulator, weights

from mmrl_core.metrics.jsonl import read_metrics
from mmrl_core.recipe import load_recipe

pytestmark = pytest.mark.timeout(1800)
TOLERANCE = 1e-6
"""Relative L2 distance between the update of the weights on the device and on the CPU, fp32."""
PRODUCTS = {"mm.out", "bmm.out", "addmm.out"}
"""Operators that every network here calls."""
REGISTERED = frozenset((HERE / "torch_npu_operators.txt").read_text(encoding="utf-8").split())
"""Operators that torch_npu 2.7.1 and 2.13.0 both have kernels for: the lists of native functions in their wheels."""


@pytest.fixture(scope="module", autouse=True)
def emulator() -> None:
    """The compiled device; skips everything here where there is no compiler."""
    require_emulator()


@pytest.fixture(scope="module")
def workshop(emulator: None, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Tiny models and recipes."""
    return Workshop.make(tmp_path_factory.mktemp("workshop"))


@pytest.mark.parametrize("part", ["TestNpu", "TestFsdp2OnNpu", "TestHfOnNpu or TestFlowOnNpu"])
def test_conformance_kit(part: str, tmp_path: Path) -> None:
    """In a process of its own: the device can be had in all of a process, or not at all."""
    # declarations of the core's components do not depend on the device
    chosen = part if part == "TestNpu" else f"({part}) and not declaration"
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=900", "-k", chosen)
    done = python(*command, str(HERE / "emulated" / "kit_npu.py"), cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 12, done.stdout


@pytest.mark.parametrize(("recipe", "model"), [("text", "lm"), ("flow", "dit")])
def test_updates_are_those_of_the_cpu(workshop: Workshop, recipe: str, model: str) -> None:
    """Two GRPO steps on one and on two ranks; no float64 on the device, nor any operator that torch_npu has not."""
    start = weights(workshop.folder / model)
    expected = weights(workshop.train(recipe, f"{recipe}-cpu", "device=cpu") / "export")
    scores = [row["grpo/score/mean"] for row in read_metrics(workshop.folder / f"{recipe}-cpu" / "metrics.jsonl")]
    for ranks in (1, 2):
        name = f"{recipe}-npu{ranks}"
        run = workshop.train(recipe, name, "device={name: npu, patches: false}", f"launcher.processes={ranks}")
        assert difference(weights(run / "export"), expected, start) < TOLERANCE
        rows = read_metrics(run / "metrics.jsonl")
        assert [row["grpo/score/mean"] for row in rows] == pytest.approx(scores, abs=1e-6)
        used = workshop.operators(name)
        assert PRODUCTS & used, "the network did not compute on the device"
        assert not sorted(operator for operator in used if not registered(operator))


def registered(operator: str) -> bool:
    """Whether torch_npu has it; in its functional form, where the emulated device is asked for the one with a given
    result."""
    base, _, overload = operator.partition(".")
    if overload in ("out", "grad_input"):
        functional = base
    else:
        functional = f"{base}.{overload.removesuffix('_out')}"
    return operator in REGISTERED or functional in REGISTERED


def test_a_stopped_run_goes_on_bit_for_bit(workshop: Workshop) -> None:
    """Weights, optimizer and random numbers come back onto the device, on two ranks."""
    whole = workshop.train("text", "whole", "device=npu", "launcher.processes=2")
    workshop.train("text", "parts", "device=npu", "launcher.processes=2", "algorithm.steps=1")
    parts = workshop.train("text", "parts", "device=npu", "launcher.processes=2")
    expected, found = weights(whole / "export"), weights(parts / "export")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [row["step"] for row in read_metrics(parts / "metrics.jsonl")] == [1, 2]


ALONE = """
import json, os
import torch
from mmrl_core.errors import DeviceError
from mmrl_core.plugins import load_plugins
from mmrl_npu.device import NpuDevice

def refused(function):
    try:
        function()
    except (NotImplementedError, RuntimeError) as error:
        return str(error).splitlines()[0]

npu = NpuDevice()
found = {"float64": refused(lambda: torch.ones(2, dtype=torch.float64, device="npu")),
         "digamma": refused(lambda: torch.ones(2, device="npu").digamma()),
         "mixed": refused(lambda: torch.ones(2, device="npu") + torch.ones(2))}
npu.activate(1)
found["device"] = str(npu.torch_device)
found["peak"] = [npu.peak_flops(torch.bfloat16), npu.peak_flops(torch.float32)]
linear = torch.nn.Linear(4, 4).to("npu")
with torch.autocast("npu", dtype=torch.bfloat16):
    found["autocast"] = str(linear(torch.ones(2, 4, device="npu")).dtype)
os.environ["HCCL_DETERMINISTIC"] = "false"
try:
    npu.set_deterministic(True)
except DeviceError as error:
    found["conflict"] = str(error)
del os.environ["HCCL_DETERMINISTIC"]
npu.set_deterministic(True)
found["set"] = [os.environ["HCCL_DETERMINISTIC"], torch.are_deterministic_algorithms_enabled()]
npu.set_deterministic(False)
found["after"] = ["HCCL_DETERMINISTIC" in os.environ, torch.are_deterministic_algorithms_enabled()]
try:
    NpuDevice().activate(2)
except DeviceError as error:
    found["too many"] = str(error)
print(json.dumps(found))
"""


def test_the_device_by_itself(tmp_path: Path) -> None:
    """What it refuses, what it says, and what it sets and takes back."""
    done = python("-c", ALONE, cwd=tmp_path, ASCEND_RT_VISIBLE_DEVICES="0,1")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "no tensors of type Double" in found["float64"]
    assert "no operator aten::digamma" in found["digamma"]
    assert "found at least two devices, npu" in found["mixed"]
    assert found["device"] == "npu:1"
    assert found["peak"] == [pytest.approx(353.8944e12), None]
    assert found["autocast"] == "torch.bfloat16"
    assert "HCCL_DETERMINISTIC=false is not reproducible" in found["conflict"]
    assert found["set"] == ["true", True]
    assert found["after"] == [False, False]
    assert "needs NPU 2, but torch_npu sees 2 (ASCEND_RT_VISIBLE_DEVICES=0,1)" in found["too many"]


def test_auto_is_the_npu_and_a_rank_can_be_given_its_environment(workshop: Workshop) -> None:
    """`device: auto` chooses it; with `launcher.environment: device` even a single rank is a process of its own."""
    run = workshop.train("text", "auto", "device=auto", "launcher.environment=device", "algorithm.steps=1")
    assert load_recipe(run / "recipe.yaml")[0].device.name == "npu"
    assert PRODUCTS & workshop.operators("auto")
