"""Equality with HPSv3 written again: from the checkpoint's tensors and the paper's and Qwen2-VL's formulas, in float64,
one image at a time, with no code of the package, of transformers' models or of its image processor."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmrl_hpsv3.reward import HpsV3
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from mmrl_core import Sample

ROOT = Path(__file__).parents[1]


class Transcription:
    """mu and sigma of one image and prompt."""

    def __init__(self, checkpoint: str, base: str) -> None:
        self.weights = {name: tensor.double() for name, tensor in load_file(checkpoint).items()}
        self.config = json.loads((Path(base) / "config.json").read_text())
        self.tokenizer = Tokenizer.from_file(str(Path(base) / "tokenizer.json"))
        self.tokenizer.add_special_tokens(["<|Reward|>"])

    def __call__(self, pixels: Any, prompt: str) -> tuple[float, float]:
        patches, places = self.patches(pixels)
        image = self.vision(patches, places)
        instruction = (ROOT / "src/mmrl_hpsv3/instruction.txt").read_bytes().decode()
        text = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * len(image) + "<|vision_end|>"
            + instruction.format(text_prompt=prompt)
            + "<|im_end|>\n<|im_start|>assistant\n"
        )  # fmt: skip
        tokens = torch.tensor(self.tokenizer.encode(text).ids)
        hidden = self.weights["model.embed_tokens.weight"][tokens]
        hidden[tokens == self.tokenizer.token_to_id("<|image_pad|>")] = image
        at = int((tokens == self.tokenizer.token_to_id("<|Reward|>")).nonzero())
        x = self.language(hidden)[at]
        x = self.linear("rm_head.0", x).clamp(min=0)
        x = self.linear("rm_head.3", x).clamp(min=0)
        mu, sigma = self.linear("rm_head.5", x).tolist()
        return mu, sigma

    # ------------------------------------------------------------------------------------------------------------ image

    @staticmethod
    def patches(pixels: Any) -> tuple[Tensor, Tensor]:
        """[P, 3 * 2 * 14 * 14] and the patches' (row, column) [P, 2], a 2 x 2 block after another."""
        height, width = pixels.shape[:2]
        down, across = max(1, round(height / 28)), max(1, round(width / 28))
        scale = math.sqrt(448 * 448 / (height * width))
        if down * across > 256:
            down, across = math.floor(height * scale / 28), math.floor(width * scale / 28)
        elif down * across < 256:
            down, across = math.ceil(height * scale / 28), math.ceil(width * scale / 28)
        image = np.asarray(Image.fromarray(pixels).resize((across * 28, down * 28), Image.BICUBIC)) / 255
        image = (image - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
        cut, places = [], []
        for block_row in range(down):
            for block_column in range(across):
                for row in (2 * block_row, 2 * block_row + 1):
                    for column in (2 * block_column, 2 * block_column + 1):
                        patch = image[row * 14 : row * 14 + 14, column * 14 : column * 14 + 14].transpose(2, 0, 1)
                        cut.append(np.stack([patch, patch], axis=1).ravel())
                        places.append((row, column))
        return torch.from_numpy(np.array(cut)), torch.tensor(places)

    def vision(self, patches: Tensor, places: Tensor) -> Tensor:
        """[P / 4, hidden]."""
        vision = self.config["vision_config"]
        heads, wide = vision["num_heads"], vision["embed_dim"]
        rows_and_columns = wide // heads // 2
        slow = (1 / 10000 ** (torch.arange(0, rows_and_columns, 2) / rows_and_columns)).bfloat16()
        angles = (places.bfloat16()[:, :, None] * slow).flatten(1)  # the published network's tables are bfloat16
        cos, sin = angles.cos().double().repeat(1, 2), angles.sin().double().repeat(1, 2)
        x = patches @ self.weights["visual.patch_embed.proj.weight"].reshape(wide, -1).T
        for i in range(vision["depth"]):
            name = f"visual.blocks.{i}."
            q, k, v = self.linear(name + "attn.qkv", self.layer_norm(name + "norm1", x)).chunk(3, dim=-1)
            q, k, v = (part.reshape(len(x), heads, -1).transpose(0, 1) for part in (q, k, v))
            attention = (rotated(q, cos, sin) @ rotated(k, cos, sin).transpose(1, 2) / math.sqrt(wide / heads)).softmax(
                -1
            )
            x = x + self.linear(name + "attn.proj", (attention @ v).transpose(0, 1).reshape(len(x), wide))
            inner = self.linear(name + "mlp.fc1", self.layer_norm(name + "norm2", x))
            x = x + self.linear(name + "mlp.fc2", inner * torch.sigmoid(1.702 * inner))
        merged = self.layer_norm("visual.merger.ln_q", x).reshape(len(x) // 4, 4 * wide)
        return self.linear("visual.merger.mlp.2", functional.gelu(self.linear("visual.merger.mlp.0", merged)))

    # --------------------------------------------------------------------------------------------------------- language

    def language(self, x: Tensor) -> Tensor:
        """[L, hidden]: positions are 0, 1, 2, ... for text and image tokens alike."""
        heads, shared = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        size = self.config["hidden_size"] // heads
        slow = (1 / self.config["rope_theta"] ** (torch.arange(0, size, 2) / size)).bfloat16().double()
        angles = torch.arange(len(x)).double()[:, None] * slow
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        later = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        for i in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{i}."
            normed = self.rms_norm(name + "input_layernorm", x)
            q, k, v = (self.linear(f"{name}self_attn.{part}_proj", normed) for part in "qkv")
            q = q.reshape(len(x), heads, size).transpose(0, 1)
            k, v = (part.reshape(len(x), shared, size).transpose(0, 1) for part in (k, v))
            k, v = (part.repeat_interleave(heads // shared, dim=0) for part in (k, v))
            scores = rotated(q, cos, sin) @ rotated(k, cos, sin).transpose(1, 2) / math.sqrt(size)
            attention = scores.masked_fill(later, -math.inf).softmax(-1)
            x = x + self.linear(name + "self_attn.o_proj", (attention @ v).transpose(0, 1).reshape(len(x), -1))
            normed = self.rms_norm(name + "post_attention_layernorm", x)
            gate = functional.silu(self.linear(name + "mlp.gate_proj", normed))
            x = x + self.linear(name + "mlp.down_proj", gate * self.linear(name + "mlp.up_proj", normed))
        return self.rms_norm("model.norm", x)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(x, self.weights[name + ".weight"], self.weights.get(name + ".bias"))

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        return functional.layer_norm(
            x, x.shape[-1:], self.weights[name + ".weight"], self.weights[name + ".bias"], 1e-6
        )

    def rms_norm(self, name: str, x: Tensor) -> Tensor:
        root = (x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]).sqrt()
        return self.weights[name + ".weight"] * x / root


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[heads, n, size] turned by the angles [n, size] of each pair (i, i + size / 2)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


CASES = [
    ((448, 448), "a red dog on a beach"),
    ((97, 333), "{text_prompt} in braces, and 雪"),
    ((701, 300), "a red dog on a beach"),
    ((3, 5), ""),
    ((1080, 1920), "word " * 300),
]


@pytest.fixture(scope="module")
def cases(sample: Callable[..., Sample]) -> list[Sample]:
    return [sample(seed, shape, prompt) for seed, (shape, prompt) in enumerate(CASES)]


@pytest.fixture(scope="module")
def expected(tiny: dict[str, str], cases: list[Sample]) -> list[tuple[float, float]]:
    transcription = Transcription(**tiny)
    return [transcription(case.image, case.prompt.question()) for case in cases]


def test_one_by_one(reward: HpsV3, cases: list[Sample], expected: list[tuple[float, float]]) -> None:
    for case, (mu, sigma) in zip(cases, expected, strict=True):
        (result,) = reward.score([case])
        assert result.failure is None
        assert dict(result.scores) == pytest.approx({"mu": mu, "sigma": sigma}, abs=1e-5)
        assert result.value == result.scores["mu"]


def test_in_a_batch_of_prompts_and_shapes_of_many_lengths(
    reward: HpsV3, cases: list[Sample], expected: list[tuple[float, float]]
) -> None:
    results = reward.score(cases)
    assert [result.value for result in results] == pytest.approx([mu for mu, _ in expected], abs=1e-5)


def test_the_same_ranking(reward: HpsV3, tiny: dict[str, str], sample: Callable[..., Sample]) -> None:
    group = [sample(seed, (40 + 9 * seed, 64), "a cat") for seed in range(6)]
    transcription = Transcription(**tiny)
    expected = [transcription(one.image, "a cat")[0] for one in group]
    values = [result.value for result in reward.score(group)]
    assert np.argsort(values).tolist() == np.argsort(expected).tolist()
    assert np.ptp(expected) > 1e-2  # or the order would say nothing
