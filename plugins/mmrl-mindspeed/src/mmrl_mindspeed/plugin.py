"""What this distribution declares to mmrl. Imported whenever plugins are listed, so it imports nothing heavy."""

from __future__ import annotations

from mmrl_core import Component, Diagnosis, Patch, hookimpl
from mmrl_mindspeed.cpu_patches import patches

mmrl_api = 1


@hookimpl
def mmrl_training_backends() -> list[Component]:
    """The backend, as dotted strings that are imported only when a recipe names it."""
    return [
        Component(
            name="megatron",
            summary="megatron-core: tensor, pipeline, sequence and data parallel",
            target="mmrl_mindspeed.backend:MegatronBackend",
            options="mmrl_mindspeed.options:MegatronOptions",
            probe="mmrl_mindspeed.probe:megatron",
        )
    ]


@hookimpl
def mmrl_patches() -> list[Patch]:
    """What megatron-core needs to run on a CPU."""
    return list(patches())


@hookimpl
def mmrl_diagnoses() -> list[Diagnosis]:
    """Which Megatron and which MindSpeed are installed."""
    return [
        Diagnosis(name="megatron-core", probe="mmrl_mindspeed.probe:megatron"),
        Diagnosis(name="mindspeed", probe="mmrl_mindspeed.probe:mindspeed"),
    ]


@hookimpl
def mmrl_weight_formats() -> list[Component]:
    """What Megatron and MindSpeed-MM keep weights in."""
    return [
        Component(
            name="mcore",
            summary="Checkpoints of Megatron: one file a tensor-parallel rank and pipeline stage",
            target="mmrl_mindspeed.mcore_format:McoreFormat",
            options="mmrl_mindspeed.format_options:McoreOptions",
        ),
        Component(
            name="mindspeed-mm",
            summary="Wan transformers of MindSpeed-MM",
            target="mmrl_mindspeed.mindspeed_mm_format:MindSpeedMmFormat",
            options="mmrl_mindspeed.format_options:MindSpeedMmOptions",
        ),
    ]
