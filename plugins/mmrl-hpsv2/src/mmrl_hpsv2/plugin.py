"""What this distribution declares to mmrl. Imported whenever plugins are listed, so it imports nothing heavy."""

from __future__ import annotations

from mmrl_core import Component, hookimpl

mmrl_api = 1


@hookimpl
def mmrl_rewards() -> list[Component]:
    """The reward, as dotted strings that are imported only when a recipe names it."""
    return [
        Component(
            name="hpsv2",
            summary="Human Preference Score v2 / v2.1 of an image or a video",
            target="mmrl_hpsv2.reward:HpsV2",
            options="mmrl_hpsv2.options:HpsV2Options",
        )
    ]
