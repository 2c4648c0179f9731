"""The built-in devices as components. Here, and not in `builtin.py`, so that no module outside this package spells the
name of an accelerator. Imports no torch."""

from __future__ import annotations

from mmrl_core.hookspecs import Component

DEVICES = (
    Component(
        name="cpu",
        summary="The host's cores",
        target="mmrl_core.devices.cpu:CpuDevice",
        probe="mmrl_core.devices.probes:cpu",
        environment="mmrl_core.devices.cpu_environment:recommend",
    ),
    Component(
        name="cuda",
        summary="NVIDIA GPUs",
        target="mmrl_core.devices.cuda:CudaDevice",
        probe="mmrl_core.devices.probes:cuda",
    ),
)
