"""The small diffusion transformer against a transcription in float64, and its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmrl_core.errors import DataError, ModelError, RecipeError
from mmrl_core.policies.flow.dit import WEIGHTS, ClassConditionalDiT, DitConfig, DitFamily, write_folder
from mmrl_core.policies.flow.families import choose_family
from mmrl_core.policies.flow.options import FlowOptions, FlowSampling
from mmrl_core.recipe import ModelSpec

CONFIG = DitConfig(sample_size=6, channels=3, patch_size=2, width=8, depth=2, heads=2, classes=["cat", "dog", "7"])
SAMPLING = FlowSampling(steps=4, height=6, width=6)


@pytest.fixture
def network() -> ClassConditionalDiT:
    made = ClassConditionalDiT(CONFIG)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.3)
    return made.eval()


@pytest.fixture
def folder(tmp_path: Path, network: ClassConditionalDiT) -> Path:
    write_folder(tmp_path / "dit", network, shift=2.0)
    return tmp_path / "dit"


@pytest.fixture
def family(folder: Path) -> DitFamily:
    return opened(folder)


def opened(folder: Path, dtype: torch.dtype = torch.float32) -> DitFamily:
    family = choose_family(folder, FlowOptions(), dtype)
    assert isinstance(family, DitFamily)
    family.prepare()
    return family


# ---------------------------------------------------------------------------------------------------------- the network


def transcribed(weights: Mapping[str, Any], pixels: Any, time: float, label: int) -> Any:
    """One image [C, H, W] through the network, in float64, token by token."""

    def linear(name: str, x: Any) -> Any:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def silu(x: Any) -> Any:
        return x / (1 + np.exp(-x))

    def normed(x: Any, scale: Any, shift: Any) -> Any:
        mean = x.mean(-1, keepdims=True)
        deviation = np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-5)
        return (x - mean) / deviation * (1 + scale) + shift

    patch, side, width = CONFIG.patch_size, CONFIG.sample_size // CONFIG.patch_size, CONFIG.width
    frequencies = [10_000.0 ** (-i / (width // 2)) for i in range(width // 2)]
    wave = np.array([f(1000 * time * w) for f in (math.sin, math.cos) for w in frequencies])
    condition = silu(linear("time_out", silu(linear("time_in", wave))) + weights["label.weight"][label])
    corners = [(row * patch, column * patch) for row in range(side) for column in range(side)]
    tokens = np.array([pixels[:, i : i + patch, j : j + patch].reshape(-1) for i, j in corners])
    hidden = linear("patch_in", tokens) + weights["position"][0]
    for index in range(CONFIG.depth):
        block = f"blocks.{index}"
        scale, shift, gate, scale2, shift2, gate2 = np.split(linear(f"{block}.modulation", condition), 6)
        query, key, value = np.split(linear(f"{block}.qkv", normed(hidden, scale, shift)), 3, axis=-1)
        size = width // CONFIG.heads
        mixed = np.zeros_like(hidden)
        for head in range(CONFIG.heads):
            part = slice(head * size, (head + 1) * size)
            scores = np.exp(query[:, part] @ key[:, part].T / math.sqrt(size))
            mixed[:, part] = scores / scores.sum(-1, keepdims=True) @ value[:, part]
        hidden = hidden + gate * linear(f"{block}.out", mixed)
        up = linear(f"{block}.up", normed(hidden, scale2, shift2))
        gelu = up * 0.5 * (1 + np.vectorize(math.erf)(up / math.sqrt(2)))
        hidden = hidden + gate2 * linear(f"{block}.down", gelu)
    scale, shift = np.split(linear("modulation", condition), 2)
    out = linear("patch_out", normed(hidden, scale, shift))
    image = np.zeros_like(pixels)
    for token, (i, j) in zip(out, corners, strict=True):
        image[:, i : i + patch, j : j + patch] = token.reshape(CONFIG.channels, patch, patch)
    return image


def test_velocity_equals_a_transcription(network: ClassConditionalDiT, family: DitFamily) -> None:
    draw = torch.Generator().manual_seed(1)
    pixels = torch.randn(4, 3, 6, 6, generator=draw)
    time, label = torch.tensor([1.0, 0.73, 0.02, 0.5]), torch.tensor([0, 2, 1, 3])
    got = family.velocity(family.load_network(torch.float32), pixels, time, {"label": label}, SAMPLING)
    weights = {name: value.double().numpy() for name, value in network.state_dict().items()}
    for row in range(4):
        want = transcribed(weights, pixels[row].double().numpy(), float(time[row]), int(label[row]))
        np.testing.assert_allclose(got[row].detach().numpy(), want, rtol=2e-5, atol=2e-5 * np.abs(want).max())


def test_a_fresh_network_predicts_nothing() -> None:
    fresh = ClassConditionalDiT(CONFIG)
    out = fresh(torch.randn(2, 3, 6, 6), torch.rand(2), torch.tensor([0, 3]))
    assert out.shape == (2, 3, 6, 6)
    assert torch.equal(out, torch.zeros_like(out)), "adaLN-zero"


def test_half_precision_keeps_the_time_exact(folder: Path) -> None:
    half, full = opened(folder, torch.bfloat16), opened(folder)
    network = half.load_network(torch.bfloat16)
    assert isinstance(network, ClassConditionalDiT)
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    assert network.frequencies.dtype == torch.float32
    pixels, time, label = torch.randn(2, 3, 6, 6), torch.tensor([0.999, 0.001]), {"label": torch.tensor([0, 1])}
    got = half.velocity(network, pixels, time, label, SAMPLING)
    want = full.velocity(full.load_network(torch.float32), pixels, time, label, SAMPLING)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0.1, atol=0.1 * float(want.detach().abs().max()))


def test_lora_adapts_every_linear_layer(folder: Path) -> None:
    pytest.importorskip("peft")
    from mmrl_core.policies.flow.network import build

    family = opened(folder)
    model = ModelSpec.model_validate({"path": str(folder), "lora": {"rank": 2}})
    network = build(family, model, torch.float32, adapters=True)
    adapted = {n.rpartition(".lora_A")[0] for n, p in network.named_parameters() if p.requires_grad and "lora_A" in n}
    plain = ClassConditionalDiT(CONFIG)
    linear = {f"network.{n}" for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear)}
    assert adapted == linear
    assert len(linear) == 5 * CONFIG.depth + 5


# ------------------------------------------------------------------------------------------------ words, shapes, pixels


def test_a_text_names_its_class(family: DitFamily) -> None:
    encoders = family.load_encoders()
    texts = ["a cat.", "the digit 7", "DOG? no: dog, dog", "", "  "]
    labels = [one["label"] for one in family.encode(encoders, texts)]
    assert [int(label) for label in labels] == [0, 2, 1, 3, 3]
    assert all(label.dtype == torch.int64 and label.shape == () for label in labels)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a cat and a dog", "2 classes (cat, dog)"),
        ("a bird", "no class"),
        ("catdog 77", "no class"),
        ("Cat", "no class"),
    ],
)
def test_a_text_without_one_class_is_an_error(family: DitFamily, text: str, found: str) -> None:
    with pytest.raises(DataError) as error:
        family.encode(family.load_encoders(), ["a cat", text])
    assert text in str(error.value)
    assert found in str(error.value)
    assert "cat, dog, 7" in str(error.value)


def test_other_sizes_are_refused(family: DitFamily) -> None:
    assert family.latent_shape(SAMPLING) == (3, 6, 6)
    for field, value in (("height", 8), ("width", 3), ("frames", 5)):
        with pytest.raises(RecipeError, match=rf"sampling\.{field}\b.*{value}"):
            family.latent_shape(SAMPLING.model_copy(update={field: value}))


def test_schedule_is_shifted_as_the_folder_says(family: DitFamily) -> None:
    sigmas = family.schedule(FlowSampling(steps=4, shift=99.0))
    want = [2 * s / (1 + s) for s in (1.0, 0.75, 0.5, 0.25, 0.0)]
    assert sigmas.dtype == torch.float32
    assert sigmas.tolist() == pytest.approx(want, abs=1e-7)


def test_pixels_are_rounded_and_grey_is_repeated(tmp_path: Path) -> None:
    grey = CONFIG.model_copy(update={"channels": 1})
    write_folder(tmp_path / "grey", ClassConditionalDiT(grey), shift=1.0)
    family = opened(tmp_path / "grey")
    latents = torch.zeros(2, 1, 6, 6)
    latents[0, 0, 0, :5] = torch.tensor([-1.0, 1.0, -7.0, 7.0, 0.5])
    pixels = family.decode(family.load_decoder(), latents, SAMPLING)
    assert pixels.shape == (2, 6, 6, 3)
    assert pixels.dtype == np.uint8
    assert pixels[0, 0, :5, 0].tolist() == [0, 255, 0, 255, round(0.75 * 255)]
    assert (pixels == pixels[..., :1]).all()


# ----------------------------------------------------------------------------------------------------------- the folder


def test_folder_is_read_back_exactly(folder: Path, network: ClassConditionalDiT, family: DitFamily) -> None:
    loaded = family.load_network(torch.float32).state_dict()
    assert family.config == CONFIG
    assert "frequencies" not in loaded
    for name, value in network.state_dict().items():
        assert torch.equal(loaded[name], value), name
    family.save_config(folder)
    written = json.loads((folder / "config.json").read_text())
    assert written == json.loads((folder / "transformer" / "config.json").read_text())
    network_blocks = family.blocks(family.load_network(torch.float32))
    assert len(network_blocks) == CONFIG.depth


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label.weight": None}, "label.weight is missing"),
        ({"extra": torch.zeros(1)}, "extra is unexpected"),
        ({"label.weight": torch.zeros(3, 8)}, r"label.weight has shape \[3, 8\], expected \[4, 8\]"),
        ({"patch_in.bias": torch.full((8,), math.nan)}, "patch_in.bias has values that are not finite"),
    ],
)
def test_weights_that_do_not_fit_are_named(folder: Path, change: dict[str, Tensor | None], message: str) -> None:
    file = folder / "transformer" / WEIGHTS
    changed = {**load_file(file), **change}
    save_file({name: value for name, value in changed.items() if value is not None}, file)
    with pytest.raises(ModelError, match=message) as error:
        opened(folder).load_network(torch.float32)
    assert str(file) in str(error.value)


def test_damaged_and_missing_files_are_named(folder: Path) -> None:
    file = folder / "transformer" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ModelError, match="cannot be read as safetensors"):
        opened(folder).load_network(torch.float32)
    file.unlink()
    with pytest.raises(ModelError, match="no such file"):
        opened(folder).load_network(torch.float32)
    (folder / "scheduler" / "scheduler_config.json").write_text('{"shift": true}')
    with pytest.raises(ModelError, match=r"scheduler_config\.json: shift is True"):
        opened(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "depth"),
        ({"hight": 3}, "hight"),
        ({"channels": 2}, "channels is 2"),
        ({"patch_size": 4}, "no multiple of patch_size 4"),
        ({"heads": 3}, "no multiple of twice the heads"),
        ({"classes": ["two words"]}, "single words"),
        ({"classes": ["a", "a"]}, "all different"),
    ],
)
def test_wrong_configurations_are_named(folder: Path, change: dict[str, Any], message: str) -> None:
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ModelError, match=message) as error:
        opened(folder)
    assert str(file) in str(error.value)
