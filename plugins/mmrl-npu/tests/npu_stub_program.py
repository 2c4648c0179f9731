"""Run by `test_npu_stub.py` in a process that imports the real torch_npu on empty CANN libraries.

Prints one JSON object: for every case its facts, or the error. Nothing is computed: tensors are fake ones on `npu:0`,
whose shapes and dtypes come from the vendor's own code.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch_npu
import torch_npu.op_plugin.meta._meta_registrations as registrations
from mmrl_npu.device import NpuDevice
from mmrl_npu.options import NpuOptions
from mmrl_npu.patches import NAMES, apply_chosen
from npu_tiny_networks import FAMILIES, output
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

registrations.get_soc_version = lambda: 220  # an Ascend 910B: the empty libraries cannot say


class Recorder(TorchDispatchMode):
    """What was dispatched: the vendor's operators, attention and the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))

    def shown(self) -> dict[str, int]:
        words = ("npu", "attention", "adamw", "rms")
        return {name: count for name, count in self.counts.items() if any(word in name for word in words)}


def network(name: str, patches: bool | dict[str, bool]) -> dict[str, Any]:
    """A forward of a tiny network in bfloat16 on one NPU."""
    torch.set_default_dtype(torch.bfloat16)
    with apply_chosen(patches, device="npu") as applied, FakeTensorMode(allow_non_fake_inputs=True):
        names = [patch.name for patch in applied.patches]
        with torch.device("npu:0"), torch.no_grad():
            module = FAMILIES[name].build()
            inputs = FAMILIES[name].inputs()
            with Recorder() as recorder:
                answer = output(module, inputs)
    return {
        "patches": names,
        "shape": list(answer.shape),
        "dtype": str(answer.dtype),
        "device": str(answer.device),
        "operators": recorder.shown(),
    }


def gradients(name: str, patches: bool | dict[str, bool]) -> dict[str, Any]:
    """Forward and backward: every parameter gets a gradient of its shape and dtype."""
    torch.set_default_dtype(torch.bfloat16)
    with apply_chosen(patches, device="npu"), FakeTensorMode(allow_non_fake_inputs=True), torch.device("npu:0"):
        module = FAMILIES[name].build()
        inputs = FAMILIES[name].inputs()
        with Recorder() as recorder:
            output(module, inputs).float().sum().backward()
        wrong = [
            key
            for key, parameter in module.named_parameters()
            if parameter.grad is None
            or parameter.grad.shape != parameter.shape
            or parameter.grad.dtype != parameter.dtype
        ]
    return {"wrong": wrong, "operators": recorder.shown()}


def optimizer() -> dict[str, Any]:
    """One step of torch's fused AdamW in float32."""
    torch.set_default_dtype(torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("npu:0"):
        parameters = [torch.nn.Parameter(torch.empty(5, 3)), torch.nn.Parameter(torch.empty(7))]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        adamw = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
        with Recorder() as recorder:
            adamw.step()
    return {"operators": recorder.shown()}


def profiler() -> dict[str, Any]:
    """The vendor's profiler as the device makes it, for each level, not started: [level, whether cores are watched]."""
    vendor = torch_npu.profiler
    said = io.StringIO()
    configured = []
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        for level in (0, 1, 2):
            made = NpuDevice(NpuOptions(profiler_level=level))._profiler(Path("profile"), f"step_{level}")
            config = made.prof_if.experimental_config
            assert made.prof_if.activities == {vendor.ProfilerActivity.CPU, vendor.ProfilerActivity.NPU}
            levels = [getattr(vendor.ProfilerLevel, f"Level{number}") for number in (0, 1, 2)]
            watched = config._aic_metrics == vendor.AiCMetrics.PipeUtilization
            configured.append([levels.index(config._profiler_level), watched])
            made.stopped = True  # or it stops itself when it is collected
    return {"configured": configured, "said": said.getvalue()}


def refusals() -> dict[str, Any]:
    """The vendor's code finds wrong calls, or these checks would show nothing."""
    said: dict[str, str] = {}

    def fake(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device="npu:0")

    wrong: dict[str, Callable[[], Any]] = {
        "keyword": lambda: torch_npu.npu_rms_norm(fake(2, 8), fake(8), eps=1e-6),
        "first by the declaration's name": lambda: torch_npu.npu_rms_norm(self=fake(2, 8), gamma=fake(8)),
    }
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, call in wrong.items():
            try:
                call()
            except (TypeError, RuntimeError, ValueError) as error:
                said[name] = type(error).__name__
    return {"refused": said}


def main(cases: list[str]) -> None:
    """Run the cases `network:NAME:default`, `gradients:NAME:all`, `optimizer`, `profiler`, `refusals`."""
    sets: dict[str, bool | dict[str, bool]] = {"all": dict.fromkeys(NAMES, True), "default": True, "none": False}
    results: dict[str, Any] = {"torch_npu": torch_npu.__version__, "devices": torch.npu.device_count()}
    for case in cases:
        kind, _, rest = case.partition(":")
        name, _, patches = rest.partition(":")
        try:
            if kind == "network":
                results[case] = network(name, sets[patches])
            elif kind == "gradients":
                results[case] = gradients(name, sets[patches])
            else:
                results[case] = {"optimizer": optimizer, "profiler": profiler, "refusals": refusals}[kind]()
        except Exception as error:  # noqa: BLE001 - the parent process asserts on it
            results[case] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc(limit=-4)}
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
