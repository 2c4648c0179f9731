"""The picture of a sample. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmrl_core.errors import MediaError
from mmrl_core.media.images import Pixels, checked_image, checked_video

if TYPE_CHECKING:
    from mmrl_core.contracts import Sample


def sample_pixels(sample: Sample) -> Pixels:
    """The sample's image [H, W, 3], or its video [F, H, W, 3]. Raises MediaError when it has neither."""
    what = f"of sample {sample.sample_id}"
    if sample.image is not None:
        return checked_image(sample.image, f"the image {what}")
    if sample.video is not None:
        return checked_video(sample.video, f"the video {what}")
    raise MediaError(f"sample {sample.sample_id} has neither an image nor a video")


def visible_samples(samples: Sequence[Sample], most: int | None = None) -> list[Sample]:
    """Those with an image or a video, by sample id, at most `most`."""
    return sorted((s for s in samples if s.image is not None or s.video is not None), key=lambda s: s.sample_id)[:most]
