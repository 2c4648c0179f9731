"""Checks that pixels and frames fit a model. The recipe's author is told the nearest values that do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmrl_core.errors import RecipeError

if TYPE_CHECKING:
    from mmrl_core.policies.flow.options import FlowSampling


def pixel_grid(sampling: FlowSampling, multiple: int, model: str, *, most: int | None = None) -> tuple[int, int]:
    """(height, width) in cells of `multiple` pixels, at most `most` each. Raises RecipeError."""
    for field, value in (("height", sampling.height), ("width", sampling.width)):
        if value % multiple:
            below = value // multiple * multiple
            raise RecipeError(_unfit(field, value, f"{model} needs multiples of {multiple}", below, below + multiple))
        if most is not None and value > most * multiple:
            raise RecipeError(f"sampling.{field} = {value}: {model} takes at most {most * multiple}")
    return sampling.height // multiple, sampling.width // multiple


def frame_count(sampling: FlowSampling, multiple: int, model: str, *, most: int | None = None) -> int:
    """Latent frames, each but the first of `multiple` video frames, at most `most`. Raises RecipeError."""
    value = sampling.frames
    if (value - 1) % multiple:
        below = 1 + (value - 1) // multiple * multiple
        need = f"{model} needs 1 + a multiple of {multiple}"
        raise RecipeError(_unfit("frames", value, need, below, below + multiple))
    count = 1 + (value - 1) // multiple
    if most is not None and count > most:
        raise RecipeError(f"sampling.frames = {value}: {model} takes at most {1 + (most - 1) * multiple}")
    return count


def one_frame(sampling: FlowSampling, model: str) -> None:
    """Raises RecipeError when video is asked of a model for images."""
    if sampling.frames != 1:
        raise RecipeError(f"sampling.frames = {sampling.frames}: {model} makes images; set it to 1")


def _unfit(field: str, value: int, need: str, below: int, above: int) -> str:
    nearest = f"{below} and {above}" if below > 0 else f"{above}"
    return f"sampling.{field} = {value}: {need}; nearest: {nearest}"
