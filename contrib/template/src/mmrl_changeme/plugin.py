"""What this distribution declares to mmrl. Imported whenever plugins are listed, so it imports nothing heavy."""

from __future__ import annotations

from mmrl_core import Component, hookimpl

mmrl_api = 1  # the version of the plugin API this is written for; checked when the plugin is loaded


@hookimpl
def mmrl_rewards() -> list[Component]:
    """The rewards of this package."""
    return [
        Component(
            name="changeme",  # the word users write in a recipe
            summary="CHANGEME: one line for `mmrl plugins`",
            target="mmrl_changeme.rewards:changeme",
            options="mmrl_changeme.options:Options",  # leave it out for a reward without options
        )
    ]
