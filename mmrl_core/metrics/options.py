"""Options of the metric writers. This module imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from mmrl_core.recipe import NonNegative, Positive, Spec

FramesPerSecond = Annotated[float, Field(gt=0, allow_inf_nan=False)]


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


class ImagesOptions(Spec):
    """Contact sheets of images and videos, in `images/` of the run folder: one of every evaluation, and now and then
    one of a step's samples."""

    every: NonNegative = 10
    """Steps between sheets of the step's samples; 0: none."""
    samples: Positive = 16
    """Most samples in a sheet."""
    largest: Annotated[int, Field(ge=16)] = 256
    """Longest side of an image in a sheet, in pixels. Larger ones are scaled down; small ones are enlarged."""
    frames: Positive = 3
    """Frames of a video in a sheet, from the first to the last; 1: the first."""
    videos: bool = False
    """Also store each video of a sheet as an mp4 file beside it (needs `pip install 'mmrl-core[video]'`)."""
    fps: FramesPerSecond = 16.0
    """Frames a second of those files."""


class RewardHistoryOptions(Spec):
    """The mean reward of every step, one number a line: line n is step n."""

    path: Annotated[str, Field(min_length=1)] = "reward_history.txt"
    """The file, absolute or relative to the run folder."""


class TensorboardOptions(Spec):
    """TensorBoard event files, in `tensorboard/` of the run folder."""

    samples: NonNegative = 2
    """How many samples to write as text each time; 0: none."""
    samples_every: Positive = 10
    """Steps between writing samples. The first step always writes some."""
    eval_images: NonNegative = 8
    """How many images of each evaluation to write, of videos the first frame; 0: none."""
    step_images: NonNegative = 0
    """How many of a step's samples to write as images, whenever samples are written; 0: none."""


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
    eval_images: NonNegative = 16
    """How many images of each evaluation to log, of videos the first frame; 0: none."""
    videos: bool = False
    """Log videos whole instead of their first frames (needs `pip install 'mmrl-core[video]'`)."""
    fps: FramesPerSecond = 16.0
    """Frames a second of those videos."""
