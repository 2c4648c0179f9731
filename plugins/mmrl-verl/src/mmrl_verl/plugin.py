"""What this distribution declares to mmrl. Imported whenever plugins are listed, so it imports nothing heavy."""

from __future__ import annotations

from mmrl_core import Component, Diagnosis, hookimpl

mmrl_api = 1


@hookimpl
def mmrl_training_backends() -> list[Component]:
    """verl's engines, as dotted strings that are imported only when a recipe names one."""
    return [
        Component(
            name="verl-fsdp2",
            summary="verl's FSDP2 engine, for text",
            target="mmrl_verl.backend:VerlFsdp2Backend",
            options="mmrl_verl.options:VerlFsdp2Options",
            probe="mmrl_verl.probe:verl",
        )
    ]


@hookimpl
def mmrl_diagnoses() -> list[Diagnosis]:
    """Which verl is installed."""
    return [Diagnosis(name="verl", probe="mmrl_verl.probe:verl")]
