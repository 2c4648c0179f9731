"""Options of the metric writers. This module imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from mmrl_core.recipe import NonNegative, Positive, Spec


class ConsoleOptions(Spec):
    """Live progress on the terminal; plain lines where the output is no terminal."""

    samples: NonNegative = 0
    """How many samples of the last step to show in a table when the run ends."""
    sample_characters: Positive = 200
    """Longest prompt and answer shown in that table."""


class JsonlOptions(Spec):
    """One JSON object a step, in the run folder."""

    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "metrics.jsonl"
    """Name of the file."""


class TensorboardOptions(Spec):
    """TensorBoard event files, in `tensorboard/` of the run folder."""

    samples: NonNegative = 2
    """How many samples to write as text each time; 0: none."""
    samples_every: Positive = 10
    """Steps between writing samples. The first step always writes some."""


class WandbOptions(Spec):
    """Weights & Biases (needs `pip install 'mmrl-core[wandb]'`)."""

    project: str = "mmrl"
    """The project runs are shown in."""
    entity: str | None = None
    """The team or user; the account's default when not set."""
    group: str | None = None
    """Shows runs with one group together."""
    tags: list[str] = Field(default_factory=list)
    """Words to find the run by."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """Where data goes. Not set: the environment variable WANDB_MODE decides, then wandb's settings."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Further values to store beside the recipe."""
