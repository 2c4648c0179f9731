"""Rewards of images and videos that need no weights: `jpeg_compressibility`, `brightness` and `sharpness`.

They are computed with numpy and Pillow. An image is uint8 [H, W, 3], a video uint8 [F, H, W, 3], of which the options
`video` and `every` say which frames count. A sample without either has failed. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mmrl_core.contracts import Sample
from mmrl_core.errors import MediaError, RewardError
from mmrl_core.media.images import Pixels, encode_jpeg
from mmrl_core.media.samples import sample_pixels
from mmrl_core.rewards.function import reward
from mmrl_core.rewards.options import BrightnessOptions, FrameOptions, JpegCompressibilityOptions, SharpnessOptions

_REC_709 = np.array([0.2126, 0.7152, 0.0722])
"""Weights of R', G' and B' in luma, Recommendation ITU-R BT.709, item 3.2."""


@reward
def jpeg_compressibility(sample: Sample, options: JpegCompressibilityOptions) -> float:
    """Minus the size of the image as a JPEG file of `quality`, in kB of 1000 bytes; with `prefer: large`, the size.

    The tasks "compressibility" and "incompressibility" of DDPO (Black et al. 2023, arXiv:2305.13301), whose published
    code takes quality 95 and these kB. The file is Pillow's, with chroma halved in both directions.
    """
    sign = -1.0 if options.prefer == "small" else 1.0
    return sign * _over_frames(sample, options, lambda image: len(encode_jpeg(image, options.quality)) / 1000)


@reward
def brightness(sample: Sample, options: BrightnessOptions) -> float:
    """Mean luma in [0, 1]: Y' = 0.2126 R' + 0.7152 G' + 0.0722 B' of the stored, gamma-encoded values / 255
    (Recommendation ITU-R BT.709)."""
    return _over_frames(sample, options, lambda image: float(luma(image).mean()))


@reward
def sharpness(sample: Sample, options: SharpnessOptions) -> float:
    """Variance of the Laplacian of luma (BT.709, in [0, 1]), a measure of focus: Pech-Pacheco et al., "Diatom
    autofocusing in brightfield microscopy: a comparative study", ICPR 2000.

    The Laplacian is that of the four neighbours, up + down + left + right - 4 * centre, at the pixels that have all of
    them; the variance divides by their number. An image below 3 x 3 pixels fails. Luma in 0 to 255 would give 255^2
    times the value.
    """
    return _over_frames(sample, options, _laplacian_variance)


def luma(image: Pixels) -> NDArray[np.float64]:
    """[H, W] in [0, 1] of an image [H, W, 3], by Recommendation ITU-R BT.709."""
    return np.asarray(image @ (_REC_709 / 255))


def _laplacian_variance(image: Pixels) -> float:
    if min(image.shape[:2]) < 3:
        raise RewardError(f"sharpness needs images of 3 x 3 pixels or more, this one has {list(image.shape[:2])}")
    y = luma(image)
    laplacian = y[:-2, 1:-1] + y[2:, 1:-1] + y[1:-1, :-2] + y[1:-1, 2:] - 4 * y[1:-1, 1:-1]
    return float(laplacian.var())


def _over_frames(sample: Sample, options: FrameOptions, value: Callable[[Pixels], float]) -> float:
    """The value of an image, or of the video's frames that the options choose: their mean."""
    try:
        pixels = sample_pixels(sample)
    except MediaError as error:
        raise RewardError(f"{error}; this reward scores images and videos only") from None
    if pixels.ndim == 3:
        return value(pixels)
    values = [value(frame) for frame in (pixels[:1] if options.video == "first" else pixels[:: options.every])]
    return math.fsum(values) / len(values)
