"""Files in the published formats, tiny: a checkpoint with open_clip's names, and a CLIP tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

State = dict[str, Tensor]

MERGES = (
    "a n",
    "an d</w>",
    "t h",
    "th e</w>",
    "d o",
    "do g</w>",
    "r e",
    "re d</w>",
    "i n",
    "in g</w>",
    "b e",
    "o n</w>",
)
"""Byte pairs that the tiny tokenizer joins, in order."""


def byte_characters() -> dict[int, str]:
    """Byte -> the character that stands for it in a byte-level vocabulary: itself when it is printable in Latin-1,
    else the next of those from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(0x100 + i) for i, b in enumerate(others)}}


def vocabulary() -> dict[str, int]:
    """Tokens in CLIP's order: bytes, bytes that end a word, merges, start and end of text."""
    characters = list(byte_characters().values())
    words = [*characters, *(c + "</w>" for c in characters), *(m.replace(" ", "") for m in MERGES)]
    return {token: i for i, token in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}


def write_tokenizer(folder: Path, extra: tuple[str, ...] = ()) -> Path:
    """The files of a diffusers pipeline's `tokenizer` folder."""
    folder.mkdir(parents=True, exist_ok=True)
    start, end = "<|startoftext|>", "<|endoftext|>"
    names = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    (folder / "vocab.json").write_text(json.dumps(vocabulary()), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(names), encoding="utf-8")
    config = {**names, "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if extra:
        size = len(vocabulary())
        (folder / "added_tokens.json").write_text(json.dumps({t: size + i for i, t in enumerate(extra)}))
    return folder


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of a network. Heads are not in a checkpoint: options say them."""

    image: int = 28
    patch: int = 14
    vision: int = 40
    vision_layers: int = 2
    text: int = 32
    text_layers: int = 2
    embed: int = 24
    context: int = 77
    vocabulary: int = len(vocabulary())


TINY = Size()
HEADS = {"vision_head_width": 20, "text_heads": 2}
"""The options that the tiny network needs."""


def parameters(size: Size = TINY, seed: int = 0) -> State:
    """Random parameters under the names, and in the shapes, of open_clip's CLIP with a vision transformer. They are
    large enough that every part of the network shows in the score."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=draw) * std

    def norm(name: str, width: int) -> State:
        return {f"{name}.weight": 1 + normal(width, std=0.2), f"{name}.bias": normal(width, std=0.2)}

    def linear(name: str, out: int, into: int) -> State:
        return {f"{name}.weight": normal(out, into, std=into**-0.5), f"{name}.bias": normal(out, std=0.2)}

    def block(name: str, width: int) -> State:
        return {
            **norm(f"{name}.ln_1", width),
            f"{name}.attn.in_proj_weight": normal(3 * width, width, std=2 * width**-0.5),
            f"{name}.attn.in_proj_bias": normal(3 * width, std=0.2),
            **linear(f"{name}.attn.out_proj", width, width),
            **norm(f"{name}.ln_2", width),
            **linear(f"{name}.mlp.c_fc", 4 * width, width),
            **linear(f"{name}.mlp.c_proj", width, 4 * width),
        }

    patches = (size.image // size.patch) ** 2
    state = {
        "positional_embedding": normal(size.context, size.text, std=0.5),
        "text_projection": normal(size.text, size.embed, std=size.text**-0.5),
        "logit_scale": torch.tensor(4.6052),
        "visual.class_embedding": normal(size.vision, std=1.0),
        "visual.positional_embedding": normal(patches + 1, size.vision, std=0.5),
        "visual.proj": normal(size.vision, size.embed, std=size.vision**-0.5),
        "visual.conv1.weight": normal(size.vision, 3, size.patch, size.patch, std=1 / size.patch),
        **norm("visual.ln_pre", size.vision),
    }
    for layer in range(size.vision_layers):
        state |= block(f"visual.transformer.resblocks.{layer}", size.vision)
    state |= norm("visual.ln_post", size.vision)
    for layer in range(size.text_layers):
        state |= block(f"transformer.resblocks.{layer}", size.text)
    state["token_embedding.weight"] = normal(size.vocabulary, size.text, std=1.0)
    return state | norm("ln_final", size.text)


def write_checkpoint(file: Path, state: State) -> Path:
    """As published: the parameters below `state_dict`."""
    torch.save({"state_dict": state}, file)
    return file
