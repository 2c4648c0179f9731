from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mmrl_hpsv3 import plugin
from mmrl_hpsv3.options import HpsV3Options
from mmrl_hpsv3.pictures import UnusableSampleError, target_size
from mmrl_hpsv3.prompt import INSTRUCTION
from mmrl_hpsv3.reward import HpsV3
from pydantic import ValidationError

from mmrl_core import RewardResult, Sample
from mmrl_core.errors import RewardError

PACKAGE_SCORES = json.loads((Path(__file__).parent / "golden" / "package_scores.json").read_text(encoding="utf-8"))
Make = Callable[..., Sample]


def set_up(device: str = "cpu", **options: Any) -> HpsV3:
    made = HpsV3(HpsV3Options(**options))
    made.setup(device)
    return made


def values(results: list[RewardResult]) -> list[float]:
    assert all(result.value is not None for result in results), results
    return [result.value for result in results if result.value is not None]


# ------------------------------------------------------------------------------------------------ hpsv3's own package


def package_samples(sample: Make) -> list[Sample]:
    return [sample(c["seed"], (c["height"], c["width"]), c["prompt"]) for c in PACKAGE_SCORES["cases"]]


def test_scores_of_the_hpsv3_package(reward: HpsV3, sample: Make) -> None:
    """hpsv3 1.0.0 with the transformers 4.45.2 it pins scored the same files and images, one at a time."""
    together = reward.score(package_samples(sample))
    for result, case in zip(together, PACKAGE_SCORES["cases"], strict=True):
        assert [result.scores["mu"], result.scores["sigma"]] == pytest.approx(case["float32"], abs=1e-4), case


def test_scores_of_the_hpsv3_package_in_bfloat16(tiny: dict[str, str], sample: Make) -> None:
    """Both round differently, so this is coarse; a wrong position, token or table moves scores by more."""
    together = set_up(**tiny, dtype="bfloat16").score(package_samples(sample))
    differences = [r.scores["mu"] - c["bfloat16"][0] for r, c in zip(together, PACKAGE_SCORES["cases"], strict=True)]
    assert np.abs(differences).max() < 0.03
    assert np.abs(differences).mean() < 0.015


def test_the_instruction_is_the_published_one() -> None:
    """INSTRUCTION + prompt_with_special_token of hpsv3/dataset/data_collator_qwen.py."""
    digest = hashlib.sha256(INSTRUCTION.encode()).hexdigest()
    assert digest == "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"


# ------------------------------------------------------------------------------------------------------- image and text


def test_sizes_are_those_of_smart_resize() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    limit = 256 * 28 * 28
    random = np.random.RandomState(0)
    sizes = [(448, 448), (447, 449), (14, 14), (1, 1), (1, 200), (2000, 10), (224, 896), (462, 434), (6000, 4000)]
    sizes += [tuple(map(int, random.randint(1, 2500, 2))) for _ in range(500)]
    compared = 0
    for height, width in sizes:
        expected = None
        if ratio(height, width) <= 200:
            expected = smart_resize(height, width, factor=28, min_pixels=limit, max_pixels=limit)
        if expected is None or ratio(*expected) > 200:
            with pytest.raises(UnusableSampleError, match="aspect ratio"):
                target_size(height, width)
        else:
            assert target_size(height, width) == expected, (height, width)
            compared += 1
    assert compared > 400


def ratio(height: int, width: int) -> float:
    return max(height, width) / min(height, width)


def test_the_prompt_counts(reward: HpsV3, sample: Make) -> None:
    first, second = values(reward.score([sample(0, (64, 64), "a cat"), sample(0, (64, 64), "a dog")]))
    assert abs(first - second) > 1e-4


def test_a_chat_is_scored_by_its_last_question(reward: HpsV3, sample: Make) -> None:
    plain = sample(0, (64, 64), "a cat")
    messages = ({"role": "system", "content": "You paint."}, {"role": "user", "content": "a cat"})
    chat = type(plain.prompt)(index=0, messages=messages)
    asked = Sample(sample_id=0, group_id=0, prompt=chat, image=plain.image)
    assert reward.score([asked]) == reward.score([plain])


def test_scale(tiny: dict[str, str], reward: HpsV3, sample: Make) -> None:
    one = sample(0, (64, 64), "a cat")
    (plain,) = reward.score([one])
    (scaled,) = set_up(**tiny, scale=0.1).score([one])
    assert scaled.scores == plain.scores
    assert scaled.value == pytest.approx(0.1 * plain.scores["mu"])


# ---------------------------------------------------------------------------------------------------------------- video


def frames_of(sample: Make, video: Sample, indices: list[int]) -> list[Sample]:
    return [sample(0, (1, 1), video.prompt.question(), image=video.video[index]) for index in indices]


def test_video_by_its_first_frame(reward: HpsV3, sample: Make) -> None:
    video = sample(3, (9, 40, 64), "a cat runs")
    (whole,), (frame,) = reward.score([video]), reward.score(frames_of(sample, video, [0]))
    assert whole == frame


@pytest.mark.parametrize(("every", "indices"), [(4, [0, 4, 8]), (3, [0, 3, 6]), (1, list(range(9))), (20, [0])])
def test_video_by_the_mean_of_every_kth_frame(
    tiny: dict[str, str], reward: HpsV3, sample: Make, every: int, indices: list[int]
) -> None:
    video, other = sample(3, (9, 40, 64), "a cat runs"), sample(4, (30, 50), "a dog")
    whole, image = set_up(**tiny, video="mean", every=every).score([video, other])
    frames = reward.score(frames_of(sample, video, indices))
    for name in ("mu", "sigma"):
        assert whole.scores[name] == pytest.approx(np.mean([frame.scores[name] for frame in frames]), abs=1e-5)
    assert image.value == pytest.approx(values(reward.score([other]))[0], abs=1e-5)


def test_a_call_holds_no_more_images_at_once_than_samples(
    tiny: dict[str, str], sample: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = set_up(**tiny, video="mean", every=1)
    sizes = []
    forward = type(made._network).forward
    monkeypatch.setattr(type(made._network), "forward", lambda self, x: sizes.append(len(x.grids)) or forward(self, x))
    made.score([sample(0, (3, 30, 30), "a"), sample(1, (2, 30, 30), "b")])
    assert sizes == [2, 2, 1]


# ------------------------------------------------------------------------------------------------------------- failures


def test_an_unusable_sample_fails_alone(reward: HpsV3, sample: Make) -> None:
    good = sample(0, (64, 64), "a cat")
    pixels = good.image
    not_finite = np.full((64, 64, 3), np.nan, dtype=np.float32)
    bad = {
        "neither an image nor a video": sample(0, (1, 1), "p", image=None),
        r"float32 \[64, 64, 3\]": sample(0, (1, 1), "p", image=not_finite),
        r"float64 \[64, 64, 3\]": sample(0, (1, 1), "p", image=pixels / 255.0),
        r"uint8 \[64, 64\]": sample(0, (1, 1), "p", image=pixels[..., 0]),
        r"uint8 \[3, 64, 64\]": sample(0, (1, 1), "p", image=pixels.transpose(2, 0, 1)),
        r"uint8 \[0, 64, 3\]": sample(0, (1, 1), "p", image=pixels[:0]),
        r"uint8 \[0, 64, 64, 3\]": sample(0, (1, 1, 1), "p", video=pixels[None][:0]),
        r"the video is a numpy.ndarray of uint8 \[64, 64, 3\]": sample(0, (1, 1, 1), "p", video=pixels),
        "is str": sample(0, (1, 1), "p", image="picture.png"),
        "aspect ratio of 300": sample(0, (1, 300), "p"),
        r"own token <\|Reward\|>": sample(0, (8, 8), "give me <|Reward|>"),
        "own token for an image": sample(0, (8, 8), "two <|image_pad|> here"),
        "own token for an image or a video": sample(0, (8, 8), "one <|video_pad|>"),
        "Qwen2-VL takes 32768": sample(0, (8, 8), "1 " * 40_000),
    }
    mixed = [one for failing in bad.values() for one in (failing, good)]
    results = reward.score(mixed)
    assert values(results[1::2]) == pytest.approx(values(reward.score([good])) * len(bad), abs=1e-5)
    for result, (reason, failing) in zip(results[::2], bad.items(), strict=True):
        assert result.value is None
        assert result.scores == {}
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(result.failure)
        assert "\n" not in (result.failure or ""), failing


def test_a_network_that_overflows_gives_a_failure(tiny: dict[str, str], sample: Make) -> None:
    made = set_up(**tiny)
    with torch.no_grad():
        made._network.rm_head[5].bias[0] = torch.nan
    (result,) = made.score([sample(0, (64, 64), "a cat")])
    assert result.value is None
    assert "mu nan" in (result.failure or "")


def test_no_samples(reward: HpsV3) -> None:
    assert reward.score([]) == []


# -------------------------------------------------------------------------------------------------------------- devices


def test_precision_is_chosen_by_the_device(tiny: dict[str, str]) -> None:
    of_head, of_rest = "rm_head.0.weight", "backbone.language_model.norm.weight"
    for device, dtype, expected in (
        ("cpu", "auto", torch.float32),
        ("cpu", "bfloat16", torch.bfloat16),
        ("meta", "auto", torch.bfloat16),
        ("meta", "float32", torch.float32),
    ):
        made = set_up(device, **tiny, dtype=dtype)
        held = made._network.state_dict()
        assert held[of_rest].dtype == expected
        assert held[of_head].dtype == torch.float32
        assert held[of_rest].device.type == "cpu"


def test_weights_come_with_onload_and_go_with_offload(
    tiny: dict[str, str], sample: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, which holds no values: whatever came back from it would be lost."""
    made = set_up(**tiny)
    samples = [sample(0, (64, 64), "a cat")]
    before = values(made.score(samples))
    emptied = []
    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace(empty_cache=lambda: emptied.append(1)))
    made.offload()
    made._device = torch.device("meta")
    made.onload()
    assert made._loaded is not None
    assert {tensor.device.type for tensor in made._loaded.values()} == {"meta"}
    assert set(made._loaded) >= set(made._network.state_dict())
    made.offload()
    assert made._loaded is None
    assert emptied == [1]
    made._device = torch.device("cpu")
    assert values(made.score(samples)) == before


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="this machine has no accelerator")
def test_scores_on_an_accelerator(tiny: dict[str, str], reward: HpsV3, sample: Make) -> None:
    samples = [sample(0, (64, 64), "a cat"), sample(1, (97, 33), "a much longer prompt about a dog")]
    device = str(torch.accelerator.current_accelerator())
    exact, rounded = set_up(device, **tiny, dtype="float32"), set_up(device, **tiny)
    assert values(exact.score(samples)) == pytest.approx(values(reward.score(samples)), abs=1e-3)
    assert values(rounded.score(samples)) == pytest.approx(values(reward.score(samples)), abs=0.05)
    rounded.offload()
    rounded.onload()
    assert values(rounded.score(samples)) == pytest.approx(values(reward.score(samples)), abs=0.05)


def test_a_device_that_is_none(tiny: dict[str, str]) -> None:
    with pytest.raises(RewardError, match="'gpu-zero' is no torch device"):
        set_up("gpu-zero", **tiny)


# -------------------------------------------------------------------------------------------------------------- options


def test_the_plugin_declares_what_the_readme_names() -> None:
    assert plugin.mmrl_api == 1
    assert [component.name for component in plugin.mmrl_rewards()] == ["hpsv3"]


@pytest.mark.parametrize(
    "bad",
    [
        *({"checkpoint": ""}, {"base": ""}, {"every": 0}, {"scale": 0}, {"scale": float("nan")}, {"video": "last"}),
        *({"dtype": "float16"}, {"weights": "x"}),
    ],
)
def test_bad_options_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        HpsV3Options(**{"checkpoint": "a", "base": "b", **bad})


@pytest.mark.parametrize("absent", ["checkpoint", "base"])
def test_both_paths_are_needed(absent: str) -> None:
    with pytest.raises(ValidationError, match=absent):
        HpsV3Options(**{name: "x" for name in ("checkpoint", "base") if name != absent})
