"""What of a sample is scored, and at which size. Imports no torch."""

from __future__ import annotations

import math

from PIL import Image

from mmrl_core import Sample
from mmrl_core.media.images import Pixels, checked_image, checked_video
from mmrl_hpsv3.options import HpsV3Options

PATCH = 28
"""Side of a merged patch of Qwen2-VL in pixels: 14 x 14 patches, merged 2 x 2."""
PIXELS = 256 * PATCH * PATCH
"""HPSv3's smallest and largest number of pixels at once."""
LARGEST_RATIO = 200
"""Qwen2-VL takes no image that is longer than this, relative to its width."""


class UnusableSampleError(Exception):
    """This sample cannot be scored; the message becomes its failure. Never leaves this package."""


def pictures(sample: Sample, options: HpsV3Options) -> list[Pixels]:
    """The images [H, W, 3] whose mean score is the sample's: its image, or frames of its video.

    Raises UnusableSampleError, or mmrl's MediaError for something that is no image or no video.
    """
    if sample.image is not None:
        return [checked_image(sample.image)]
    if sample.video is None:
        raise UnusableSampleError("the sample has neither an image nor a video")
    frames = checked_video(sample.video)
    return [frames[0]] if options.video == "first" else list(frames[:: options.every])


def target_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) that HPSv3 resizes an image to: multiples of 28, close to 256 * 28 * 28 pixels together.

    Qwen2-VL's smart resize with equal limits (package qwen-vl-utils, and hpsv3 1.0.0): each side is rounded to a
    multiple; unless that gives exactly the wanted area, both are scaled by one factor to that area and then rounded
    down where the image was too large, and up where it was too small.

    Raises UnusableSampleError for an image too long for Qwen2-VL.
    """
    _check_ratio(height, width)
    rounded = max(PATCH, round(height / PATCH) * PATCH) * max(PATCH, round(width / PATCH) * PATCH)
    if rounded > PIXELS:
        shrink = math.sqrt(height * width / PIXELS)
        size = (math.floor(height / shrink / PATCH) * PATCH, math.floor(width / shrink / PATCH) * PATCH)
    elif rounded < PIXELS:
        grow = math.sqrt(PIXELS / (height * width))
        size = (math.ceil(height * grow / PATCH) * PATCH, math.ceil(width * grow / PATCH) * PATCH)
    else:
        size = (max(PATCH, round(height / PATCH) * PATCH), max(PATCH, round(width / PATCH) * PATCH))
    _check_ratio(*size)
    return size


def resized(pixels: Pixels) -> Image.Image:
    """The image [H, W, 3] at HPSv3's size, resampled by Pillow's bicubic filter. Raises as `target_size`."""
    height, width = target_size(*pixels.shape[:2])
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def _check_ratio(height: int, width: int) -> None:
    ratio = max(height, width) / min(height, width)
    if ratio > LARGEST_RATIO:
        raise UnusableSampleError(
            f"the image of {height} x {width} has an aspect ratio of {ratio:.0f}; Qwen2-VL takes up to {LARGEST_RATIO}"
        )
