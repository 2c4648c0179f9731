"""What this distribution declares to mmrl. Imported whenever plugins are listed, so it imports nothing heavy."""

from __future__ import annotations

from mmrl_core import Component, Diagnosis, hookimpl

mmrl_api = 1


@hookimpl
def mmrl_rollout_engines() -> list[Component]:
    """The engine, as dotted strings that are imported only when a recipe names it."""
    return [
        Component(
            name="vllm",
            summary="vLLM in this process, with a copy of the weights that is updated every step",
            target="mmrl_vllm.engine:VllmEngine",
            options="mmrl_vllm.options:VllmOptions",
            probe="mmrl_vllm.probe:vllm",
        )
    ]


@hookimpl
def mmrl_diagnoses() -> list[Diagnosis]:
    """Which vLLM is installed."""
    return [Diagnosis(name="vllm", probe="mmrl_vllm.probe:vllm")]
