"""A tiny random HPSv3 in exactly the published files' layout, for tests of this package and of recipes that name it.

Its scores mean nothing. The same seed gives the same files on every machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from mmrl_hpsv3.prompt import INSTRUCTION

VISION = {"depth": 2, "embed_dim": 32, "hidden_size": 48, "in_chans": 3, "mlp_ratio": 2, "num_heads": 2}
PATCHES = {"patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2}
TEXT = {
    "hidden_size": VISION["hidden_size"],
    "intermediate_size": 96,
    "num_attention_heads": 6,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
}
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2 splits text before merging bytes."""


def write_tiny(folder: Path, *, seed: int = 0) -> dict[str, str]:
    """Write `HPSv3.safetensors` and a folder `Qwen2-VL` below `folder`.

    Returns the options `checkpoint` and `base` that name them.
    """
    base = folder / "Qwen2-VL"
    base.mkdir(parents=True)
    vocabulary = _write_tokenizer(base)
    _write_json(base / "config.json", _config(vocabulary))
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    processor = {
        **{"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2},
        **{"image_mean": mean, "image_std": std, "image_processor_type": "Qwen2VLImageProcessor"},
        "processor_class": "Qwen2VLProcessor",
    }
    _write_json(base / "preprocessor_config.json", processor)
    random = np.random.RandomState(seed)  # its stream is frozen, unlike a Generator's
    checkpoint = folder / "HPSv3.safetensors"
    save_file({name: _tensor(name, shape, random) for name, shape in _shapes(len(vocabulary) + 1)}, checkpoint)
    return {"checkpoint": str(checkpoint), "base": str(base)}


def _config(vocabulary: dict[str, int]) -> dict[str, Any]:
    ids = {token.strip("<|>"): vocabulary[token] for token in SPECIAL_TOKENS}
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        **{"bos_token_id": ids["endoftext"], "eos_token_id": ids["im_end"]},
        **{f"{name}_token_id": ids[name] for name in ("vision_start", "vision_end")},
        **{"vision_token_id": ids["vision_pad"], "image_token_id": ids["image_pad"]},
        "video_token_id": ids["video_pad"],
        **TEXT,
        **{"attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-06},
        **{"max_position_embeddings": 32768, "rope_theta": 1000000.0},
        **{"max_window_layers": 2, "sliding_window": 32768, "use_sliding_window": False, "use_cache": True},
        **{"tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": len(vocabulary) + 7},
        "vision_config": {**VISION, **PATCHES},
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
    }


def _shapes(rows: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Published names and shapes; matrices are [out, in]."""
    wide, merged = VISION["embed_dim"], 4 * VISION["embed_dim"]
    yield "visual.patch_embed.proj.weight", (wide, 3, 2, 14, 14)
    for i in range(VISION["depth"]):
        layers: dict[str, tuple[int, ...]] = {"norm1": (wide,), "norm2": (wide,)}
        layers |= {"attn.qkv": (3 * wide, wide), "attn.proj": (wide, wide)}
        layers |= {"mlp.fc1": (2 * wide, wide), "mlp.fc2": (wide, 2 * wide)}
        for name, shape in layers.items():
            yield f"visual.blocks.{i}.{name}.weight", shape
            yield f"visual.blocks.{i}.{name}.bias", shape[:1]
    hidden, inner = TEXT["hidden_size"], TEXT["intermediate_size"]
    mergers: dict[str, tuple[int, ...]] = {"ln_q": (wide,), "mlp.0": (merged, merged), "mlp.2": (hidden, merged)}
    for name, shape in mergers.items():
        yield f"visual.merger.{name}.weight", shape
        yield f"visual.merger.{name}.bias", shape[:1]
    yield "model.embed_tokens.weight", (rows, hidden)
    keys = hidden // TEXT["num_attention_heads"] * TEXT["num_key_value_heads"]
    for i in range(TEXT["num_hidden_layers"]):
        for name, out in (("q", hidden), ("k", keys), ("v", keys)):
            yield f"model.layers.{i}.self_attn.{name}_proj.weight", (out, hidden)
            yield f"model.layers.{i}.self_attn.{name}_proj.bias", (out,)
        yield f"model.layers.{i}.self_attn.o_proj.weight", (hidden, hidden)
        for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            yield f"model.layers.{i}.mlp.{name}_proj.weight", shape
        yield f"model.layers.{i}.input_layernorm.weight", (hidden,)
        yield f"model.layers.{i}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (rows, hidden)
    for index, (out, into) in ((0, (1024, hidden)), (3, (16, 1024)), (5, (2, 16))):
        yield f"rm_head.{index}.weight", (out, into)
        yield f"rm_head.{index}.bias", (out,)


def _tensor(name: str, shape: tuple[int, ...], random: np.random.RandomState) -> torch.Tensor:
    """Large enough for scores to differ: fan-in scaling, norms around 1, small biases."""
    drawn = random.standard_normal(shape)
    if name.endswith("bias"):
        values = 0.1 * drawn
    elif len(shape) == 1:
        values = 1 + 0.2 * drawn
    else:
        values = drawn * (1.0 if "embed_tokens" in name else 1.5 / np.sqrt(np.prod(shape[1:])))
    rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
    return rounded.float() if name.startswith("rm_head.") else rounded


def _write_tokenizer(base: Path) -> dict[str, int]:
    """Qwen2's byte-level tokenizer with merges for the instruction's words. Returns its vocabulary."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    for word in dict.fromkeys(re.findall(r" ?[A-Za-z]+", INSTRUCTION)):
        symbols = word.replace(" ", "Ġ")
        for end in range(1, len(symbols)):
            if symbols[: end + 1] not in vocabulary:
                vocabulary[symbols[: end + 1]] = len(vocabulary)
                merges.append((symbols[:end], symbols[end]))
    _write_json(base / "vocab.json", vocabulary)
    lines = "".join(f"{left} {right}\n" for left, right in merges)
    (base / "merges.txt").write_text(f"#version: 0.2\n{lines}", encoding="utf-8")
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(base / "tokenizer.json"))
    whole: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    stated = {
        **{"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 32768, "add_prefix_space": False},
        **{"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", "bos_token": None, "unk_token": None},
        **{"errors": "replace", "split_special_tokens": False, "clean_up_tokenization_spaces": False},
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "added_tokens_decoder": {str(whole[token]): {"content": token, **flags} for token in SPECIAL_TOKENS},
    }
    _write_json(base / "tokenizer_config.json", stated)
    return whole


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
