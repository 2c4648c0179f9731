"""Small models of the families that the backend `megatron` trains, in Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mmrl_core.testing.tiny import byte_tokenizer

CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def write_model(folder: Path, family: str, *, layers: int = 4, seed: int = 0, **config: Any) -> Path:
    """A random model with a byte tokenizer (a vocabulary of odd size, so that tensor parallelism pads it), its norms
    and biases not the ones and zeros that a mistake would leave unseen."""
    config_class, model_class = CLASSES[family]
    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    values: dict[str, Any] = {
        "vocab_size": len(tokenizer) + 1 - len(tokenizer) % 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.05,
        "tie_word_embeddings": family != "qwen2",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family == "qwen3":
        values["head_dim"] = 32
    model = model_class(config_class(**{**values, **config}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
