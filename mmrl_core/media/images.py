"""Images as uint8 arrays [H, W, 3]: checked, stored and read with Pillow. Imports no torch."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmrl_core.errors import MediaError
from mmrl_core.media.files import replacing

Pixels: TypeAlias = NDArray[np.uint8]
"""An image [H, W, 3] or a video [F, H, W, 3], RGB."""

JPEG_QUALITY = 95
"""Pillow's scale of 1 to 95; what images are stored with."""

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}


def checked_image(value: Any, what: str = "the image") -> Pixels:
    """`value` when it is a uint8 array [H, W, 3] that is not empty. Raises MediaError saying what it is instead."""
    if _is_pixels(value, 3):
        return value  # type: ignore[no-any-return]
    raise MediaError(f"{what} is {description(value)}; an image is a uint8 array [H, W, 3]")


def checked_video(value: Any, what: str = "the video") -> Pixels:
    """`value` when it is a uint8 array [F, H, W, 3] that is not empty. Raises MediaError saying what it is instead."""
    if _is_pixels(value, 4):
        return value  # type: ignore[no-any-return]
    raise MediaError(f"{what} is {description(value)}; a video is a uint8 array [frames, H, W, 3]")


def _is_pixels(value: Any, dimensions: int) -> bool:
    return (
        isinstance(value, np.ndarray)
        and value.dtype == np.uint8
        and value.ndim == dimensions
        and value.shape[-1] == 3
        and value.size > 0
    )


def description(value: Any) -> str:
    """Type, element type and shape, in words."""
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    return kind if shape is None else f"a {kind} of {dtype} {list(shape)}"


def save_image(path: Path, pixels: Pixels, *, quality: int = JPEG_QUALITY) -> None:
    """Store an image [H, W, 3] as PNG or JPEG, by the suffix of `path`; the file is there whole or not at all.

    `quality` is of JPEG only. Raises MediaError for another suffix, for something that is no image, and when the file
    cannot be written.
    """
    form = _FORMATS.get(path.suffix.lower())
    if form is None:
        raise MediaError(f"{path}: images are stored as {', '.join(_FORMATS)}; choose one of these suffixes")
    image = Image.fromarray(checked_image(pixels, f"what to store as {path}"))
    with replacing(path) as beside, beside.open("wb") as file:
        image.save(file, form, **({"quality": quality} if form == "JPEG" else {}))


def encode_jpeg(pixels: Pixels, quality: int = JPEG_QUALITY) -> bytes:
    """A JPEG file of an image [H, W, 3]: baseline, Huffman tables of the standard, chroma halved in both directions
    (4:2:0), which are Pillow's defaults."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def read_image(path: Path) -> Pixels:
    """The image of a file as RGB, [H, W, 3]. Raises MediaError naming the file when it is missing or unreadable."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow's readers raise
        raise MediaError(f"{path}: cannot be read as an image: {error}") from error
