"""The device on an emulated npu: the conformance kit, text and flow runs against the CPU, resuming, refused operators.

This shows wiring: that everything which should run on the device does, and nothing needs what it has not. The emulated
device computes with the CPU's kernels; about the numbers, the speed or the memory of an Ascend chip it says nothing.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated_runs import HERE, Workshop, python, require_emulator, weights
from mmrl_npu.patches import NAMES

from mmrl_core.metrics.jsonl import read_metrics
from mmrl_core.recipe import load_recipe
from mmrl_core.testing.texts import relative_difference

pytestmark = pytest.mark.timeout(1800)
TOLERANCE = 1e-6
"""Relative L2 distance between what the device and the CPU compute, fp32, without patches."""
PATCHED = 1e-5
"""The same with the fused operators in the place of those that they fuse."""
CHANGE = {("text", "unpatched"): 1e-6, ("dit", "unpatched"): 1e-6, ("dit", "patched"): 1e-6}
"""Relative L2 distance between what one update changed, where both have the same gradients bit for bit."""
CHANGE_ELSEWHERE = 1e-2
"""And where they have not: FLUX, whose rotary tables diffusers makes in float64 but on NPUs, and networks with patches.
AdamW divides a gradient by its own size, so a weight whose gradient is nothing but rounding moves by the learning rate,
in some direction."""
REGISTERED = frozenset((HERE / "torch_npu_operators.txt").read_text(encoding="utf-8").split())
"""Operators that torch_npu 2.7.1 and 2.13.0 both have kernels for: the lists of native functions in their wheels.
(`gelu` is functional in one and has a given result in the other.)"""
PRODUCTS = {"mm.out", "bmm.out"}
"""Matrix products as PyTorch asks a device for them."""


@pytest.fixture(scope="module", autouse=True)
def emulator() -> None:
    """The compiled device; skips everything here where there is no compiler."""
    require_emulator()


@pytest.fixture(scope="module")
def workshop(emulator: None, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Tiny models and recipes."""
    return Workshop.make(tmp_path_factory.mktemp("workshop"))


def test_conformance_kit(tmp_path: Path) -> None:
    """In a process of its own: the device can be had in all of a process, or not at all."""
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=900")
    # declarations of the core's components do not depend on the device
    chosen = ("-k", "TestNpu or not declaration")
    done = python(*command, *chosen, str(HERE / "emulated" / "kit_npu.py"), cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 80, done.stdout


@pytest.fixture(scope="module")
def updates(emulator: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `npu_emulated_updates.py` found."""
    folder = tmp_path_factory.mktemp("updates")
    done = python(str(HERE / "npu_emulated_updates.py"), str(folder), cwd=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


TEXT = {"npu_rms_norm", "npu_swiglu", "npu_rotary_mul", "npu_fusion_attention"}
FLUX = {"npu_rms_norm", "npu_gelu", "npu_rotary_mul", "npu_fusion_attention"}


@pytest.mark.parametrize(("model", "fused"), [("text", TEXT), ("dit", set()), ("flux", FLUX)])
@pytest.mark.parametrize("way", ["unpatched", "patched"])
def test_an_update_is_that_of_the_cpu(model: str, fused: set[str], way: str, updates: dict[str, Any]) -> None:
    """Of the same samples, with the recipe's defaults: log-probs when sampled and when replayed, loss, gradients and
    weights."""
    found = updates[f"{model} {way}"]
    limit = TOLERANCE if way == "unpatched" else PATCHED
    assert {k: found[k] for k in ("sampled", "log-probs", "loss", "gradients", "weights") if found[k] >= limit} == {}
    assert found["change"] < CHANGE.get((model, way), CHANGE_ELSEWHERE)
    assert set(found["operators"]) == (fused if way == "patched" else set())


def scores(run: Path) -> list[float]:
    """Mean score of each step."""
    return [row["grpo/score/mean"] for row in read_metrics(run / "metrics.jsonl")]


@pytest.mark.parametrize("recipe", ["text", "flux"])
def test_runs_are_those_of_the_cpu(workshop: Workshop, recipe: str) -> None:
    """Two GRPO steps of one rank on the CPU and of two on the device; no float64 on the device, nor any operator that
    torch_npu has not."""
    expected = workshop.trained(recipe, f"{recipe}-cpu", "device=cpu")
    name = f"{recipe}-npu"
    run = workshop.trained(recipe, name, "device={name: npu, patches: false}", "launcher.processes=2")
    learnt = relative_difference(weights(expected / "export"), weights(workshop.folder / recipe))
    assert learnt > 1000 * TOLERANCE
    assert relative_difference(weights(run / "export"), weights(expected / "export")) < TOLERANCE
    assert scores(run) == pytest.approx(scores(expected), abs=1e-6)
    used = workshop.operators(name)
    assert PRODUCTS & used, "the network did not compute on the device"
    assert not sorted(operator for operator in used if not registered(operator))


@pytest.mark.parametrize(
    ("recipe", "device", "fused"),
    [
        ("text", "auto", TEXT - {"npu_fusion_attention"}),
        ("flux", f"{{name: npu, patches: {json.dumps(dict.fromkeys(NAMES, True))}}}", FLUX),
    ],
)
def test_patched_runs_are_those_of_the_cpu(workshop: Workshop, recipe: str, device: str, fused: set[str]) -> None:
    """The patches that are on by default, on the device that `auto` finds, in a process that the launcher gives its
    environment; and all of them. Every operator is one of ours or of torch_npu's list."""
    expected = workshop.trained(recipe, f"{recipe}-cpu", "device=cpu")
    name = f"{recipe}-patched"
    run = workshop.train(recipe, name, f"device={device}", "launcher.environment=device")
    assert load_recipe(run / "recipe.yaml")[0].device.name == "npu"
    assert relative_difference(weights(run / "export"), weights(expected / "export")) < PATCHED
    assert scores(run) == pytest.approx(scores(expected), abs=1e-5)
    used = workshop.operators(name)
    assert {operator.removeprefix("npu::") for operator in used if operator.startswith("npu::")} == fused
    assert not sorted(op for op in used if not op.startswith("npu::") and not registered(op))
    assert "patches in force: transformers-rms-norm" in (run / "run.log").read_text(encoding="utf-8")


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
    settings = ("device={name: npu, patches: false}", "launcher.processes=2")
    whole = workshop.trained("text", "text-npu", *settings)
    workshop.train("text", "parts", *settings, "algorithm.steps=1")
    parts = workshop.train("text", "parts", *settings)
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
    assert "at least two devices, npu" in found["mixed"]
    assert found["device"] == "npu:1"
    assert found["peak"] == [pytest.approx(353.8944e12), None]
    assert found["autocast"] == "torch.bfloat16"
    assert "HCCL_DETERMINISTIC=false is not reproducible" in found["conflict"]
    assert found["set"] == ["true", True]
    assert found["after"] == [False, False]
    assert "needs NPU 2, but torch_npu sees 2 (ASCEND_RT_VISIBLE_DEVICES=0,1)" in found["too many"]
