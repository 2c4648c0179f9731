"""Small models of every architecture, written by transformers; sizes are odd so that nothing fits by accident."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class Variant:
    family: str
    tied: bool
    shard: str = "10GB"

    def __str__(self) -> str:
        return f"{self.family}-{'tied' if self.tied else 'untied'}"


VARIANTS = [
    Variant("llama", False, shard="40KB"),
    Variant("llama", True),
    Variant("qwen2", True),
    Variant("qwen2", False),
    Variant("qwen3", True, shard="40KB"),
    Variant("qwen3", False),
]

SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 40,
    "intermediate_size": 44,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}


def write_model(folder: Path, variant: Variant, dtype: torch.dtype = torch.float32, **sizes: Any) -> Path:
    """A folder that transformers wrote, every tensor random."""
    import transformers

    config_class, model_class = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }[variant.family]
    own = {"head_dim": 10} if variant.family != "qwen2" else {"hidden_size": 48}
    config = config_class(**{**SIZES, **own, **sizes}, tie_word_embeddings=variant.tied, initializer_range=0.2)
    torch.manual_seed(VARIANTS.index(variant) if variant in VARIANTS else 0)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size=variant.shard)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    """Everything in a folder's safetensors files."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Bit for bit, names, dtypes and shapes included."""
    return left.keys() == right.keys() and all(
        left[n].dtype == right[n].dtype and torch.equal(left[n], right[n]) for n in left
    )
