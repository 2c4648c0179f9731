"""Scores against an independent float64 transcription of the published network, preprocessing and tokenizer."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hpsv2_reference
import hpsv2_tiny
import numpy as np
import pytest
import torch
from mmrl_hpsv2.options import HpsV2Options
from mmrl_hpsv2.pixels import to_pixels
from mmrl_hpsv2.reward import HpsV2
from pydantic import ValidationError

from mmrl_core import Sample
from mmrl_core.errors import RewardError
from mmrl_core.testing.rewards import picture_sample, text_sample

SHAPES = [(40, 64), (333, 97), (1, 1), (720, 405), (224, 224), (405, 720), (3, 5), (225, 224), (29, 28)]
PROMPTS = ("a red dog and the thing on the bed", "Den\u00e9b's 2 dogs &amp;amp; Bo\u0301")
Made = Callable[..., HpsV2]


@pytest.fixture
def made(checkpoint: Path, tokenizer_folder: Path) -> Made:
    def make(**options: Any) -> HpsV2:
        given = {"checkpoint": str(checkpoint), "tokenizer": str(tokenizer_folder), **hpsv2_tiny.HEADS, **options}
        reward = HpsV2(HpsV2Options.model_validate(given))
        reward.setup("cpu")
        reward.onload()
        return reward

    return make


def values(reward: HpsV2, samples: list[Sample]) -> list[float]:
    results = reward.score(samples)
    assert [r.failure for r in results] == [None] * len(samples)
    return [r.value for r in results if r.value is not None]


def expected(state: hpsv2_tiny.State, samples: list[Sample], size: int = 28, heads: tuple[int, int] = (2, 2)) -> Any:
    images, texts = [s.image for s in samples], [s.prompt.question() for s in samples]
    return hpsv2_reference.scores(state, images, texts, size=size, heads=heads)


# -------------------------------------------------------------------------------------------------------- the published


def test_odd_shapes_and_prompts(made: Made, state: hpsv2_tiny.State) -> None:
    samples = [picture_sample(*shape, sample_id=i, question=q) for i, shape in enumerate(SHAPES) for q in PROMPTS]
    reference = expected(state, samples)
    assert np.ptp(reference) > 0.1, "the tiny network tells nothing apart"
    np.testing.assert_allclose(values(made(), samples), reference, atol=2e-6)


def test_a_group_is_ranked_alike(made: Made, state: hpsv2_tiny.State) -> None:
    group = [picture_sample(30 + 7 * i, 64 - 5 * i, sample_id=i, question=PROMPTS[0]) for i in range(8)]
    reference = np.array(expected(state, group))
    assert np.diff(np.sort(reference)).min() > 1e-5
    assert np.argsort(values(made(), group)).tolist() == np.argsort(reference).tolist()


def test_published_widths_need_no_head_options(tokenizer_folder: Path, tmp_path: Path) -> None:
    """ViT-H-14's widths, image size and heads, with few layers."""
    size = hpsv2_tiny.Size(image=224, vision=1280, vision_layers=1, text=1024, text_layers=1, embed=64)
    state = hpsv2_tiny.parameters(size)
    half = {name: tensor.half() for name, tensor in state.items()}  # as published
    path = hpsv2_tiny.write_checkpoint(tmp_path / "wide.pt", half)
    reward = HpsV2(HpsV2Options(checkpoint=str(path), tokenizer=str(tokenizer_folder)))
    reward.setup("cpu")
    samples = [picture_sample(*shape, sample_id=i, question=PROMPTS[0]) for i, shape in enumerate(SHAPES[:5])]
    np.testing.assert_allclose(
        values(reward, samples), expected(half, samples, size=224, heads=(16, 16)), atol=2e-6
    )  # fmt: skip


@pytest.mark.parametrize("size", [28, 224])
@pytest.mark.parametrize("shape", [*SHAPES, (1024, 576), (64, 500)])
def test_pixels_are_those_of_the_published_transform(shape: tuple[int, int], size: int) -> None:
    image = picture_sample(*shape).image
    np.testing.assert_allclose(to_pixels(image, size), hpsv2_reference.pixels(image, size), atol=1e-6)


def test_safetensors_scores_alike(made: Made, state: hpsv2_tiny.State, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(state, tmp_path / "tiny.safetensors")
    samples = [picture_sample(40, 30)]
    assert values(made(checkpoint=str(tmp_path / "tiny.safetensors")), samples) == values(made(), samples)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.05), ("float16", 0.005)])
def test_half_precision_is_close(made: Made, dtype: str, tolerance: float) -> None:
    samples = [picture_sample(40, 30 + i, sample_id=i) for i in range(4)]
    np.testing.assert_allclose(values(made(dtype=dtype), samples), values(made(), samples), atol=tolerance)


# ---------------------------------------------------------------------------------------------------- batches and video


def test_the_number_of_images_at_once_does_not_matter(made: Made) -> None:
    samples = [picture_sample(20 + i, 40, sample_id=i, question=PROMPTS[i % 2]) for i in range(7)]
    np.testing.assert_allclose(
        values(made(images_per_forward=2), samples), values(made(images_per_forward=64), samples), atol=1e-6
    )


def test_a_video_counts_by_its_first_frame_or_by_a_mean(made: Made) -> None:
    video = picture_sample(8, 24, 40, sample_id=3)
    frames = [
        Sample(sample_id=i, group_id=0, prompt=video.prompt, image=frame) for i, frame in enumerate(video.video)
    ]  # fmt: skip
    each = values(made(), frames)
    assert np.ptp(each) > 1e-3
    assert values(made(), [video]) == pytest.approx([each[0]], abs=1e-6)
    for every in (1, 3, 8, 100):
        reward = made(video="mean", every=every, images_per_forward=3)
        assert values(reward, [video, frames[1]]) == pytest.approx([np.mean(each[::every]), each[1]], abs=1e-6)


def test_scale_multiplies(made: Made) -> None:
    samples = [picture_sample(40, 30)]
    assert values(made(scale=0.1), samples) == pytest.approx([0.1 * values(made(), samples)[0]])


def test_an_image_goes_before_a_video(made: Made) -> None:
    image, video = picture_sample(30, 30, sample_id=1), picture_sample(2, 30, 30, sample_id=2)
    both = Sample(sample_id=0, group_id=0, prompt=image.prompt, image=image.image, video=video.video)
    assert values(made(), [both]) == values(made(), [image])


def test_a_chat_is_scored_by_its_last_question(made: Made) -> None:
    from mmrl_core.contracts import Prompt

    plain = picture_sample(30, 30, question="a dog")
    messages = ({"role": "user", "content": "x"}, {"role": "assistant", "content": "y"})
    chat = Prompt(index=0, messages=(*messages, {"role": "user", "content": "a dog"}))
    assert values(made(), [Sample(sample_id=0, group_id=0, prompt=chat, image=plain.image)]) == values(made(), [plain])


# ------------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "neither an image nor a video"),
        ({"image": np.zeros((8, 8, 3), dtype=np.float32)}, r"float32 with shape \[8, 8, 3\].*uint8 \[H, W, 3\]"),
        ({"image": np.zeros((8, 8), dtype=np.uint8)}, r"shape \[8, 8\]"),
        ({"image": np.zeros((8, 8, 4), dtype=np.uint8)}, r"shape \[8, 8, 4\]"),
        ({"image": np.zeros((0, 8, 3), dtype=np.uint8)}, r"shape \[0, 8, 3\]"),
        ({"image": "cat.png"}, "is a str"),
        ({"image": np.zeros((1, 1000, 3), dtype=np.uint8)}, "1 x 1000 pixels has no pixels left"),
        ({"video": np.zeros((0, 8, 8, 3), dtype=np.uint8)}, r"video is \[0, 8, 8, 3\]"),
        ({"video": np.zeros((8, 8, 3), dtype=np.uint8)}, r"video is \[8, 8, 3\]"),
        ({"video": [1, 2]}, "video is list"),
        ({"video": np.zeros((2, 8, 8, 3), dtype=np.int64)}, "int64"),
    ],
)
def test_an_unreadable_sample_fails_alone(made: Made, fields: dict[str, Any], reason: str) -> None:
    good = [picture_sample(30, 40, sample_id=i, question=PROMPTS[0]) for i in range(2)]
    bad = Sample(sample_id=5, group_id=2, prompt=good[0].prompt, **fields)
    reward = made()
    first, failed, last = reward.score([good[0], bad, good[1]])
    assert failed.value is None
    assert failed.failure is not None
    assert re.search(reason, failed.failure), failed.failure
    assert [first.value, last.value] == pytest.approx(values(reward, good), abs=1e-6)


def test_only_unreadable_samples(made: Made) -> None:
    results = made().score([text_sample("text"), text_sample("text", sample_id=1)])
    assert [r.value for r in results] == [None, None]


def test_not_a_number_is_a_failure(made: Made, state: hpsv2_tiny.State, tmp_path: Path) -> None:
    broken = {**state, "visual.proj": torch.full_like(state["visual.proj"], torch.nan)}
    path = hpsv2_tiny.write_checkpoint(tmp_path / "nan.pt", broken)
    (result,) = made(checkpoint=str(path)).score([picture_sample(8, 8)])
    assert result.value is None
    assert "score is nan" in (result.failure or "")


@pytest.mark.parametrize(
    "bad",
    [
        {"checkpoint": ""},
        {"dtype": "float64"},
        {"video": "last"},
        {"every": 0},
        {"scale": float("nan")},
        {"images_per_forward": 0},
        {"chekpoint": "x"},
    ],
)
def test_bad_options_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        HpsV2Options.model_validate({"checkpoint": "a", "tokenizer": "b", **bad})


@pytest.mark.parametrize("left_out", ["checkpoint", "tokenizer"])
def test_both_paths_are_required(left_out: str) -> None:
    given = {"checkpoint": "a", "tokenizer": "b"}
    del given[left_out]
    with pytest.raises(ValidationError, match=left_out):
        HpsV2Options.model_validate(given)


def test_set_up_failures_are_the_rewards_own_errors(made: Made) -> None:
    with pytest.raises(RewardError, match="xswu/HPSv2"):
        made(checkpoint="/nowhere/HPS_v2.1_compressed.pt")
    with pytest.raises(RewardError, match=r"does not exist.*`tokenizer` folder of a FLUX"):
        made(tokenizer="/nowhere")
