"""Videos as uint8 arrays [F, H, W, 3] and as mp4 files, through PyAV. Imports no torch, and PyAV only when used."""

from __future__ import annotations

import importlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from mmrl_core.errors import MediaError
from mmrl_core.media.files import replacing
from mmrl_core.media.images import Pixels, checked_video

_CRF = "18"
"""x264's constant rate factor: losses that are hard to see, at a few times the size of its default 23."""

_BT709, _LIMITED_RANGE = 1, 1
"""Code points of ITU-T H.273, written into the stream so that every player shows the same colours."""


def require_pyav(why: str) -> Any:
    """The module `av`. Raises MediaError naming the cure when it cannot be imported; `why` says who needs it."""
    try:
        return importlib.import_module("av")
    except ImportError as error:
        raise MediaError(
            f"{why} needs PyAV, which cannot be imported ({error}). Cure: pip install 'mmrl-core[video]'"
        ) from error


def even_sized(frames: Pixels) -> Pixels:
    """[F, H, W, 3] with H and W rounded up to even numbers: the last row or column is repeated, nothing is scaled or
    cut. yuv420p stores colour for blocks of 2 x 2 pixels, so it has no odd sizes."""
    _, height, width, _ = frames.shape
    return np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def write_video(path: Path, frames: Pixels, *, fps: float) -> None:
    """Store a video [F, H, W, 3] at `fps` frames a second as mp4: H.264, yuv420p, BT.709 in limited range.

    Odd sizes become even by repeating the last row or column (see `even_sized`). The file is there whole or not at
    all. Raises MediaError when PyAV is missing, for something that is no video, for a suffix that is not .mp4, and
    when the file cannot be written.
    """
    av = require_pyav(f"storing {path}")
    if path.suffix.lower() != ".mp4":
        raise MediaError(f"{path}: videos are stored as .mp4; choose this suffix")
    if not fps > 0:
        raise MediaError(f"{path}: {fps} frames a second; it must be more than 0")
    pixels = even_sized(checked_video(frames, f"what to store as {path}"))
    with replacing(path) as beside:
        try:
            _encode(av, beside, pixels, fps)
        except av.FFmpegError as error:
            raise MediaError(f"{path}: cannot be written as H.264: {error}") from error


def _encode(av: Any, path: Path, pixels: Pixels, fps: float) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": _CRF})
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED_RANGE
        for image in pixels:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            converted = frame.reformat(
                format="yuv420p", dst_colorspace="ITU709", src_color_range="JPEG", dst_color_range="MPEG"
            )
            container.mux(stream.encode(converted))
        container.mux(stream.encode(None))


def read_video(path: Path) -> tuple[Pixels, float]:
    """The frames [F, H, W, 3] of a video file and its frames a second.

    Raises MediaError when PyAV is missing, or naming the file when it is missing, unreadable or holds no frame.
    """
    av = require_pyav(f"reading {path}")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise MediaError(f"{path}: holds no video")
            stream = container.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            rate = stream.average_rate
    except (av.FFmpegError, OSError) as error:
        raise MediaError(f"{path}: cannot be read as a video: {error}") from error
    if not frames or not rate:
        raise MediaError(f"{path}: holds no frame")
    return np.stack(frames), float(rate)


def first_frame(pixels: Pixels) -> Pixels:
    """The first frame [H, W, 3] of a video [F, H, W, 3]; an image as it is."""
    first: Pixels = pixels[0] if pixels.ndim == 4 else pixels
    return first


def spread_frames(frames: Pixels, count: int) -> Pixels:
    """At most `count` >= 1 frames of a video [F, H, W, 3], evenly spread from the first to the last; one: the first."""
    assert count >= 1
    chosen = np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)
    spread: Pixels = frames[chosen]
    return spread
