"""What this distribution declares to mmrl. Imported whenever plugins are listed, so it imports nothing heavy."""

from __future__ import annotations

from mmrl_core import Component, hookimpl

mmrl_api = 1


@hookimpl
def mmrl_rewards() -> list[Component]:
    """The two rewards, as dotted strings that are imported only when a recipe names them."""
    return [
        Component(
            name="brevity",
            summary="Short texts: halves with every so many words",
            target="mmrl_reward_brevity.rewards:Brevity",
            options="mmrl_reward_brevity.options:BrevityOptions",
        ),
        Component(
            name="distinct",
            summary="Texts that do not repeat themselves",
            target="mmrl_reward_brevity.rewards:distinct",
        ),
    ]
