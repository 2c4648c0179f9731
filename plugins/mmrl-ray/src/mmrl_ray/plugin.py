"""What this distribution declares to mmrl. Imported whenever plugins are listed, so it imports nothing heavy."""

from __future__ import annotations

from mmrl_core import Component, hookimpl

mmrl_api = 1


@hookimpl
def mmrl_launchers() -> list[Component]:
    """The launcher, as dotted strings that are imported only when a recipe names it."""
    return [
        Component(
            name="ray",
            summary="Ranks on a Ray cluster: one a device, restarted from the last checkpoint when one is lost",
            target="mmrl_ray.launcher:RayLauncher",
            options="mmrl_ray.options:RayOptions",
            probe="mmrl_ray.probe:ray",
        )
    ]
