"""Rewards without weights, against closed forms and scipy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError
from scipy.ndimage import laplace

from mmrl_core.contracts import Prompt, RewardResult, Sample
from mmrl_core.rewards.image import brightness, jpeg_compressibility, sharpness
from mmrl_core.rewards.options import BrightnessOptions, JpegCompressibilityOptions, SharpnessOptions

DRAW = np.random.default_rng(5)
NOISE = DRAW.integers(0, 256, (41, 57, 3), dtype=np.uint8)
VIDEO = DRAW.integers(0, 256, (9, 24, 31, 3), dtype=np.uint8)
REWARDS = [
    (jpeg_compressibility, JpegCompressibilityOptions),
    (brightness, BrightnessOptions),
    (sharpness, SharpnessOptions),
]


def plain(*colour: int) -> Any:
    return np.full((16, 24, 3), colour, np.uint8)


def result(reward: Any, options: Any, **parts: Any) -> RewardResult:
    prompt = Prompt(index=0, text="a fox", origin="prompts.txt:1")
    (scored,) = reward.create(options).score([Sample(sample_id=7, group_id=0, prompt=prompt, **parts)])
    return scored  # type: ignore[no-any-return]


def value(reward: Any, options: Any, **parts: Any) -> float:
    scored = result(reward, options, **parts)
    assert scored.failure is None
    assert scored.value is not None
    return scored.value


# ------------------------------------------------------------------------------------------------- jpeg_compressibility


@pytest.mark.parametrize("quality", [30, 95])
def test_the_size_is_that_of_the_stored_file(tmp_path: Path, quality: int) -> None:
    Image.fromarray(NOISE).save(tmp_path / "a.jpg", quality=quality)
    size = (tmp_path / "a.jpg").stat().st_size / 1000
    small = value(jpeg_compressibility, JpegCompressibilityOptions(quality=quality), image=NOISE)
    large = value(jpeg_compressibility, JpegCompressibilityOptions(quality=quality, prefer="large"), image=NOISE)
    assert (small, large) == (-size, size)


def test_the_default_is_that_of_the_paper(tmp_path: Path) -> None:
    Image.fromarray(NOISE).save(tmp_path / "a.jpg", quality=95)
    expected = -(tmp_path / "a.jpg").stat().st_size / 1000
    assert value(jpeg_compressibility, JpegCompressibilityOptions(), image=NOISE) == expected


def test_plain_images_compress_better_than_noise() -> None:
    options = JpegCompressibilityOptions()
    noise = DRAW.integers(0, 256, (16, 24, 3), dtype=np.uint8)
    assert value(jpeg_compressibility, options, image=plain(9, 9, 9)) > value(
        jpeg_compressibility, options, image=noise
    )


@pytest.mark.parametrize("bad", [{"quality": 0}, {"quality": 96}, {"prefer": "tiny"}, {"every": 0}, {"video": "last"}])
def test_wrong_options(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        JpegCompressibilityOptions.model_validate(bad)


# ----------------------------------------------------------------------------------------------------------- brightness


@pytest.mark.parametrize(
    ("colour", "expected"),
    [
        ((0, 0, 0), 0.0),
        ((255, 255, 255), 1.0),
        ((255, 0, 0), 0.2126),
        ((0, 255, 0), 0.7152),
        ((0, 0, 255), 0.0722),
        ((51, 51, 51), 0.2),
    ],
)
def test_brightness_of_plain_images(colour: tuple[int, int, int], expected: float) -> None:
    assert value(brightness, BrightnessOptions(), image=plain(*colour)) == pytest.approx(expected, abs=1e-12)


def test_brightness_is_a_mean() -> None:
    half = np.concatenate([plain(0, 0, 0), plain(255, 255, 255)[:8]])
    assert value(brightness, BrightnessOptions(), image=half) == pytest.approx(1 / 3, abs=1e-12)


# ------------------------------------------------------------------------------------------------------------ sharpness


def reference_sharpness(image: Any) -> float:
    grey = sum(image[..., c].astype(np.float64) * w for c, w in enumerate((0.2126, 0.7152, 0.0722))) / 255
    return float(np.var(laplace(grey)[1:-1, 1:-1]))


def test_sharpness_is_the_variance_of_the_laplacian() -> None:
    assert value(sharpness, SharpnessOptions(), image=NOISE) == pytest.approx(reference_sharpness(NOISE), rel=1e-10)


def test_sharpness_in_closed_form() -> None:
    """One white pixel in a black 5 x 5 image: among the 9 inner pixels the Laplacian is -4 once, 1 four times."""
    image = np.zeros((5, 5, 3), np.uint8)
    image[2, 2] = 255
    assert value(sharpness, SharpnessOptions(), image=image) == pytest.approx(20 / 9, rel=1e-12)
    assert value(sharpness, SharpnessOptions(), image=plain(7, 8, 9)) == pytest.approx(0, abs=1e-24)
    ramp = (np.arange(16)[:, None, None] * 10 + np.zeros((1, 8, 3))).astype(np.uint8)
    assert value(sharpness, SharpnessOptions(), image=ramp) == pytest.approx(0, abs=1e-24)


def test_sharpness_falls_when_blurred() -> None:
    blurred = (NOISE[:-1].astype(int) + NOISE[1:]) // 2
    options = SharpnessOptions()
    assert value(sharpness, options, image=blurred.astype(np.uint8)) < value(sharpness, options, image=NOISE) / 2


@pytest.mark.parametrize("shape", [(2, 9, 3), (9, 2, 3)])
def test_an_image_too_small_for_sharpness_fails(shape: tuple[int, int, int]) -> None:
    scored = result(sharpness, SharpnessOptions(), image=np.zeros(shape, np.uint8))
    assert scored.value is None
    assert "3 x 3" in (scored.failure or "")


# -------------------------------------------------------------------------------------------------- videos, and neither


@pytest.mark.parametrize(("reward", "options"), REWARDS)
def test_videos(reward: Any, options: Any) -> None:
    each = [value(reward, options(), image=frame) for frame in VIDEO]
    assert value(reward, options(), video=VIDEO) == each[0]
    assert value(reward, options(video="first", every=2), video=VIDEO) == each[0]
    assert value(reward, options(video="mean", every=1), video=VIDEO) == pytest.approx(np.mean(each), rel=1e-12)
    assert value(reward, options(video="mean"), video=VIDEO) == pytest.approx(np.mean(each[::4]), rel=1e-12)
    assert value(reward, options(video="mean", every=99), video=VIDEO) == each[0]
    assert value(reward, options(video="mean", every=4), image=NOISE) == value(reward, options(), image=NOISE)


@pytest.mark.parametrize(("reward", "options"), REWARDS)
@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"text": "words"}, "sample 7 has neither an image nor a video"),
        ({}, "neither"),
        ({"image": NOISE / 255}, "float64"),
        ({"image": NOISE[..., 0]}, r"[41, 57]"),
        ({"video": NOISE}, "frames"),
        ({"video": VIDEO[:0]}, "[0, 24, 31, 3]"),
    ],
)
def test_what_cannot_be_looked_at_fails_with_a_reason(reward: Any, options: Any, parts: Any, reason: str) -> None:
    scored = result(reward, options(), **parts)
    assert scored.value is None
    assert reason in (scored.failure or "")
