"""Run by `test_npu_patches_emulated.py` in a process that has the emulated device.

Compares patched networks on it with unpatched ones on the CPU, and prints one JSON object.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from mmrl_npu.device import NpuDevice
from mmrl_npu.options import NpuOptions
from mmrl_npu.patches import NAMES
from npu_tiny_networks import FAMILIES, output
from torch import Tensor, nn
from torch_npu.fused import CALLS


def run(network: nn.Module, inputs: dict[str, Any], place: torch.device) -> dict[str, Tensor]:
    """The answer and the gradient of every parameter, on the CPU."""
    network.to(place).zero_grad()
    answer = output(network, {k: v.to(place) if torch.is_tensor(v) else v for k, v in inputs.items()})
    answer.square().sum().backward()
    gradients = {name: p.grad.cpu().clone() for name, p in network.named_parameters() if p.grad is not None}
    return {"answer": answer.detach().cpu(), **gradients}


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest deviation of a tensor, relative to its largest value."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[k] - theirs[k]).abs().max() / theirs[k].abs().max().clamp_min(1e-30)) for k in ours)


def main() -> None:
    """For each family: deviations and operators, patched and after reverting."""
    device = NpuDevice(NpuOptions(patches=dict.fromkeys(NAMES, True)))
    place = device.activate(0)
    assert device.patches is not None
    results: dict[str, Any] = {"device": str(place), "patches": [patch.name for patch in device.patches.patches]}
    device.activate(0)
    cases: dict[str, tuple[nn.Module, dict[str, Any], dict[str, Tensor]]] = {}
    for name, family in FAMILIES.items():
        torch.manual_seed(3)
        network, inputs = family.build(), family.inputs()
        expected = run(network, inputs, torch.device("cpu"))
        CALLS.clear()
        deviation = difference(run(network, inputs, place), expected)
        results[name] = {"patched": deviation, "operators": dict(CALLS)}
        cases[name] = network, inputs, expected
    device.patches.revert()
    for name, (network, inputs, expected) in cases.items():
        CALLS.clear()
        results[name]["reverted"] = difference(run(network, inputs, place), expected)
        results[name]["operators reverted"] = dict(CALLS)
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    main()
