"""The text around a prompt and an image, to the byte as HPSv3 was trained with it. Imports no torch."""

from __future__ import annotations

from importlib.resources import files

REWARD_TOKEN = "<|Reward|>"
"""HPSv3's special token, added behind Qwen2-VL's; the reward head reads the hidden state at its position."""
IMAGE_TOKEN = "<|image_pad|>"
"""Stands for one merged patch of the image."""

INSTRUCTION = files("mmrl_hpsv3").joinpath("instruction.txt").read_text(encoding="utf-8")
"""The user's text with `{text_prompt}` for the prompt: data of HPSv3 (package hpsv3 1.0.0, MIT licence, HPSv3 team)."""

# Qwen2-VL-Instruct's chat template, rendered for one user message that holds an image and then a text.
_BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
_BETWEEN = "<|vision_end|>"
_AFTER = "<|im_end|>\n<|im_start|>assistant\n"


def render(prompt: str, image_tokens: int) -> str:
    """The whole text for `prompt` and an image of so many merged patches."""
    instruction = INSTRUCTION.replace("{text_prompt}", prompt)
    return f"{_BEFORE}{IMAGE_TOKEN * image_tokens}{_BETWEEN}{instruction}{_AFTER}"
