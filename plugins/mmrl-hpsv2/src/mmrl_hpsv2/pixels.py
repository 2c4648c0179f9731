"""From an image to the network's input: open_clip's inference transform with `resize_mode="longest"`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmrl_core.errors import RewardError

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def to_pixels(image: Any, size: int) -> Tensor:
    """A uint8 array [H, W, 3] -> [3, size, size] fp32.

    Scaled so that the longest side is `size` (Pillow's antialiased bicubic, in 8 bits), centred on black (one more
    row or column at the bottom or right when the rest is odd), then normalised with CLIP's mean and deviation.
    Raises RewardError for anything else, and for an image so thin that nothing would be left of its short side.
    """
    height, width = _checked(image)
    ratio = max(height / size, width / size)
    scaled_height, scaled_width = round(height / ratio), round(width / ratio)
    if min(scaled_height, scaled_width) < 1:
        raise RewardError(
            f"an image of {height} x {width} pixels has no pixels left on its short side once scaled to {size}"
        )
    picture = Image.fromarray(np.ascontiguousarray(image))
    if (scaled_height, scaled_width) != (height, width):
        picture = picture.resize((scaled_width, scaled_height), Image.Resampling.BICUBIC)
    square = np.zeros((size, size, 3), dtype=np.uint8)
    top, left = (size - scaled_height) // 2, (size - scaled_width) // 2
    square[top : top + scaled_height, left : left + scaled_width] = np.asarray(picture)
    pixels = torch.from_numpy(square).permute(2, 0, 1).to(torch.float32) / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def _checked(image: Any) -> tuple[int, int]:
    """(height, width). Raises RewardError."""
    if not isinstance(image, np.ndarray):
        raise RewardError(f"the image is a {type(image).__name__}; it must be a uint8 array [H, W, 3]")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise RewardError(
            f"the image is an array of {image.dtype} with shape {list(image.shape)}; it must be uint8 [H, W, 3]"
        )
    return image.shape[0], image.shape[1]
