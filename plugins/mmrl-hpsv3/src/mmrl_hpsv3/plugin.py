"""What this distribution declares to mmrl. Imported whenever plugins are listed, so it imports nothing heavy."""

from __future__ import annotations

from mmrl_core import Component, hookimpl

mmrl_api = 1


@hookimpl
def mmrl_rewards() -> list[Component]:
    """The reward, as dotted strings that are imported only when a recipe names it."""
    return [
        Component(
            name="hpsv3",
            summary="HPSv3: human preference for an image or video frames given its prompt (Qwen2-VL-7B)",
            target="mmrl_hpsv3.reward:HpsV3",
            options="mmrl_hpsv3.options:HpsV3Options",
        )
    ]
