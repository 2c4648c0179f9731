"""What this distribution declares to mmrl. Imported whenever plugins are listed, so it imports nothing heavy."""

from __future__ import annotations

from mmrl_core import Component, Diagnosis, Patch, hookimpl
from mmrl_npu import diagnoses
from mmrl_npu.patches import PATCHES

mmrl_api = 1


@hookimpl
def mmrl_device_ops() -> list[Component]:
    """The device, as dotted strings that are imported only when a recipe names it."""
    return [
        Component(
            name="npu",
            summary="Huawei Ascend NPUs (torch_npu, HCCL)",
            target="mmrl_npu.device:NpuDevice",
            options="mmrl_npu.options:NpuOptions",
            probe="mmrl_npu.probe:npu",
            environment="mmrl_npu.environment:recommend",
        )
    ]


@hookimpl
def mmrl_diagnoses() -> list[Diagnosis]:
    """What to look at on an Ascend machine; elsewhere nothing."""
    return diagnoses.declared()


@hookimpl
def mmrl_patches() -> list[Patch]:
    """Fused operators for transformers and diffusers; the device applies those that the recipe asks for."""
    return list(PATCHES)
