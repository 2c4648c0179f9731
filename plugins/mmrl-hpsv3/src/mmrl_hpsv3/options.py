"""Options, checked when a recipe is read. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mmrl_core.recipe import Positive, Spec


class HpsV3Options(Spec):
    """Options of `hpsv3`."""

    checkpoint: str = Field(min_length=1)
    """The published weights on the local disk: `HPSv3.safetensors` of `MizzenAI/HPSv3` (16.6 GB), or the same weights
    as a `.pt` / `.pth` file."""
    base: str = Field(min_length=1)
    """A local folder with the configuration, tokenizer and image processor of `Qwen/Qwen2-VL-7B-Instruct` (not of
    Qwen2.5-VL); its weights are not read and need not be there."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of Qwen2-VL; the reward head is always float32. auto: float32 on a CPU, else bfloat16, which HPSv3 was
    trained and published with."""
    video: Literal["first", "mean"] = "first"
    """How a video is scored: by its first frame, or by the mean over every `every`-th frame."""
    every: Positive = 4
    """With `video: mean`, frames 0, every, 2 * every, ... are scored."""
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """The reward is this times HPSv3's mu, whose means over generators go from -0.2 to 10.6 in HPSv3's own table."""
