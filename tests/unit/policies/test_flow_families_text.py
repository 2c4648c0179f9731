"""Conditions of texts are what the pipelines' `encode_prompt` gives, and pixels what they decode."""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np
import pytest
import torch

from mmrl_core.errors import RecipeError, RolloutError
from mmrl_core.policies.flow.options import FlowSampling

FAMILIES = ["flux", "sd3", "wan21", "wan22"]
TEXTS = ["a red cat", "", "  The <b>house</b> &amp;amp; the sky,\n two   dogs; 37% of the video is blue! " * 3]


def expected_conditions(pipeline: Any, name: str, texts: list[str], length: int) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        if name == "flux":
            prompt, pooled, _ = pipeline.encode_prompt(texts, None, max_sequence_length=length)
        elif name == "sd3":
            prompt, _, pooled, _ = pipeline.encode_prompt(
                texts, None, None, do_classifier_free_guidance=False, max_sequence_length=length
            )
        else:
            prompt, _ = pipeline.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=length)
            return {"prompt_embeds": prompt}
    return {"prompt_embeds": prompt, "pooled_prompt_embeds": pooled}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_conditions_are_the_pipelines(
    name: str, dtype: str, pipeline_folder: Any, prepared: Any, diffusers_pipeline: Any
) -> None:
    """Short, empty and cut texts in one batch; the recipe's precision of encoders."""
    folder = pipeline_folder(name)
    family = prepared(folder, encoder_dtype=dtype, max_text_tokens=40)
    pipeline = diffusers_pipeline(folder, dtype=getattr(torch, dtype))
    got = family.encode(family.load_encoders(), TEXTS)
    expected = expected_conditions(pipeline, name, TEXTS, 40)
    assert len(got) == len(TEXTS)
    for row, conditions in enumerate(got):
        assert set(conditions) == set(expected)
        for key, value in conditions.items():
            assert value.dtype == expected[key].dtype == getattr(torch, dtype)
            assert value.device.type == "cpu"
            assert not value.requires_grad
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size()
            assert torch.equal(value, expected[key][row])
            assert value.shape[-1] == family.widths[key]
    assert not torch.equal(got[0]["prompt_embeds"], got[1]["prompt_embeds"])


@pytest.mark.parametrize(("name", "length"), [("flux", 512), ("sd3", 77 + 256), ("wan21", 512), ("wan22", 512)])
def test_lengths_without_a_limit_in_the_recipe(
    name: str, length: int, pipeline_folder: Any, prepared: Any, diffusers_pipeline: Any
) -> None:
    """The pipelines' own defaults, except Wan's: its `__call__` says 512 and its `encode_prompt` 226."""
    folder = pipeline_folder(name)
    family = prepared(folder, max_text_tokens=None)
    (got,) = family.encode(family.load_encoders(), ["a cat"])
    assert got["prompt_embeds"].shape == (length, 32)
    expected = expected_conditions(diffusers_pipeline(folder), name, ["a cat"], 256 if name == "sd3" else 512)
    assert torch.equal(got["prompt_embeds"], expected["prompt_embeds"][0])


@pytest.mark.parametrize("name", ["wan21", "wan22"])
def test_wan_has_zeros_beyond_the_prompt(name: str, pipeline_folder: Any, prepared: Any) -> None:
    family = prepared(pipeline_folder(name))
    encoders = family.load_encoders()
    (conditions,) = family.encode(encoders, ["a cat"])
    count = len(encoders.tokenizers["text_encoder"]("a cat").input_ids)
    assert 0 < count < 24
    assert (conditions["prompt_embeds"][:count].abs().sum(-1) > 0).all()
    assert (conditions["prompt_embeds"][count:] == 0).all()


def test_sd3_without_t5_has_zeros(own_folder: Any, prepared: Any, diffusers_pipeline: Any) -> None:
    folder = own_folder("sd3")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    family = prepared(folder)
    encoders = family.load_encoders()
    assert set(encoders.models) == {"text_encoder", "text_encoder_2"}
    got = family.encode(encoders, TEXTS)
    pipeline = diffusers_pipeline(folder, text_encoder_3=None, tokenizer_3=None)
    expected = expected_conditions(pipeline, "sd3", TEXTS, 24)
    for row, conditions in enumerate(got):
        assert torch.equal(conditions["prompt_embeds"], expected["prompt_embeds"][row])
        assert torch.equal(conditions["pooled_prompt_embeds"], expected["pooled_prompt_embeds"][row])
    assert got[0]["prompt_embeds"].shape == (77 + 24, 32)
    assert (got[0]["prompt_embeds"][77:] == 0).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_encoders_are_of_the_networks_precision(name: str, pipeline_folder: Any, prepared: Any) -> None:
    encoders = prepared(pipeline_folder(name), torch.bfloat16).load_encoders()
    assert {p.dtype for p in encoders.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in encoders.parameters())
    assert not any(m.training for m in encoders.modules())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_first_cut_prompt_is_said_in_the_log_and_all_are_counted(
    name: str, pipeline_folder: Any, prepared: Any, caplog: pytest.LogCaptureFixture
) -> None:
    family = prepared(pipeline_folder(name), max_text_tokens=8)
    encoders = family.load_encoders()
    with caplog.at_level(logging.WARNING, logger="mmrl.model"):
        assert family.encode(encoders, []) == []
        family.encode(encoders, ["a cat"])
        assert not [m for m in caplog.messages if "is cut" in m]
        for other in ("house", "cat"):
            family.encode(encoders, ["a cat", f"two dogs on the {other} of a cat in the sky"])
    (message,) = [m for m in caplog.messages if "is cut" in m]
    assert "is cut to 8 (model.policy.max_text_tokens)" in message
    assert "two dogs on the house" in message
    assert (encoders.cuts, encoders.cut_rows) == (2, (1,))


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_too_many_text_tokens_are_refused(name: str, pipeline_folder: Any, prepared: Any) -> None:
    with pytest.raises(RecipeError, match=r"model\.policy\.max_text_tokens = 600: .* at most 512"):
        prepared(pipeline_folder(name), max_text_tokens=600)


# --------------------------------------------------------------------------------------------------------------- pixels


def as_uint8(pipeline: Any, name: str, latents: torch.Tensor) -> np.ndarray:
    """What the pipeline saves as pictures of these latents, by its own code: they replace those of its last step."""
    from PIL import Image

    calls: dict[str, Any] = {"height": 64, "width": 96, "num_inference_steps": 1, "output_type": "pil"}
    if "wan" in name:
        calls |= {"num_frames": 9, "guidance_scale": 1.0}

    def at_the_end(_pipeline: Any, _step: int, _time: Any, _values: Any) -> dict[str, torch.Tensor]:
        return {"latents": latents.clone()}

    done = pipeline(["a cat"] * len(latents), callback_on_step_end=at_the_end, max_sequence_length=24, **calls)
    if "wan" in name:
        return np.stack([np.stack([np.asarray(frame) for frame in video]) for video in done.frames])
    assert all(isinstance(image, Image.Image) for image in done.images)
    return np.stack([np.asarray(image) for image in done.images])


@pytest.mark.parametrize("name", FAMILIES)
def test_pixels_are_the_pipelines(name: str, pipeline_folder: Any, prepared: Any, diffusers_pipeline: Any) -> None:
    folder = pipeline_folder(name)
    family, pipeline = prepared(folder), diffusers_pipeline(folder)
    sampling = FlowSampling(height=64, width=96, frames=9 if "wan" in name else 1)
    latents = torch.randn(2, *family.latent_shape(sampling), generator=torch.Generator().manual_seed(3))
    pixels = family.decode(family.load_decoder(), latents, sampling)
    assert pixels.dtype == np.uint8
    assert pixels.shape == ((2, 9, 64, 96, 3) if "wan" in name else (2, 64, 96, 3))
    expected = as_uint8(pipeline, name, latents).astype(int)
    difference = np.abs(pixels.astype(int) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.001
    assert expected.std() > 30


@pytest.mark.parametrize("name", FAMILIES)
def test_pixels_in_bf16_are_close(name: str, pipeline_folder: Any, prepared: Any) -> None:
    exact, rough = prepared(pipeline_folder(name)), prepared(pipeline_folder(name), vae_dtype="bfloat16")
    sampling = FlowSampling(height=32, width=64, frames=5 if "wan" in name else 1)
    latents = torch.randn(1, *exact.latent_shape(sampling), generator=torch.Generator().manual_seed(4))
    decoder = rough.load_decoder()
    assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16}
    difference = rough.decode(decoder, latents, sampling).astype(int) - exact.decode(
        exact.load_decoder(), latents, sampling
    ).astype(int)
    assert 0 < np.abs(difference).mean() < 12


def test_a_video_of_one_frame(pipeline_folder: Any, prepared: Any) -> None:
    family, sampling = prepared(pipeline_folder("wan22")), FlowSampling(height=32, width=64, frames=1)
    assert family.latent_shape(sampling) == (48, 1, 2, 4)
    pixels = family.decode(family.load_decoder(), torch.randn(1, 48, 1, 2, 4), sampling)
    assert pixels.shape == (1, 1, 32, 64, 3)


@pytest.mark.parametrize("name", FAMILIES)
def test_decoders_can_tile(name: str, pipeline_folder: Any, prepared: Any) -> None:
    """The policy switches tiling on and off through these two methods."""
    decoder = prepared(pipeline_folder(name)).load_decoder()
    decoder.enable_tiling()
    assert decoder.use_tiling
    decoder.disable_tiling()
    assert not decoder.use_tiling


@pytest.mark.parametrize("name", ["flux", "wan21"])
def test_diverged_latents_are_no_picture(name: str, pipeline_folder: Any, prepared: Any) -> None:
    family = prepared(pipeline_folder(name))
    sampling = FlowSampling(height=32, width=32, frames=1)
    latents = torch.full((1, *family.latent_shape(sampling)), torch.nan)
    with pytest.raises(RolloutError, match="not finite"):
        family.decode(family.load_decoder(), latents, sampling)
