"""A tiny language model and a recipe that trains it in seconds on one core. Needs no network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_language_model(
    folder: Path,
    *,
    architecture: Literal["llama", "qwen2"] = "llama",
    tie_word_embeddings: bool = True,
    seed: int = 0,
    end_tokens: Sequence[str] = (),
    extra_vocabulary: int = 0,
    head_dim: int = 16,
) -> Path:
    """Write an ordinary Hugging Face folder of a random model: 2 layers, hidden 64, 4 heads of which 2 for keys, fp32.

    A token is a byte, so digits, letters and anything else read as one would expect. Weights (biases and norms
    included) are drawn wide enough that every part of the network shows in the log-probs.

    Args:
        folder: where to write; returned.
        end_tokens: single characters that end a response beside `</s>`, so that responses differ in length.
        extra_vocabulary: rows of the embedding that no token uses, as real models have.
        head_dim: width of an attention head; some inference kernels want 32 or more.
    """
    import torch
    from transformers import GenerationConfig

    tokenizer = byte_tokenizer()
    torch_state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = _model(architecture, len(tokenizer) + extra_vocabulary, tie_word_embeddings, tokenizer, head_dim)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    finally:
        torch.set_rng_state(torch_state)
    ends = [tokenizer.eos_token_id]
    for text in end_tokens:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise ValueError(f"end token {text!r} is {len(ids)} tokens; give single ASCII characters")
        ends += ids
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=tokenizer.pad_token_id,
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def byte_tokenizer() -> Any:
    """A fast transformers tokenizer with one token a byte, `<s>`, `</s>`, `<pad>` and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "</s>", *_ROLES]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*specials, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=list(_ROLES),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def _model(architecture: str, vocabulary: int, tied: bool, tokenizer: Any, head_dim: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[architecture]
    config = config_class(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=512,
        initializer_range=0.15,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model_class(config)


def tiny_recipe(model: str | Path, run_dir: str | Path, /, **overrides: Any) -> dict[str, Any]:
    """A recipe of two quick steps on the CPU: arithmetic prompts, the reward `numeric` inline, plain writers.

    `overrides` are sections. A mapping is merged into the default section, unless it names another component; anything
    else replaces it: `tiny_recipe(m, d, algorithm={"steps": 4}, backend="mine", rewards=[...])`.
    """
    recipe: dict[str, Any] = {
        "name": "tiny",
        "run_dir": str(run_dir),
        "seed": 0,
        "device": "cpu",
        "launcher": "local",
        "model": {"path": str(model), "policy": "causal_lm", "dtype": "float32"},
        "backend": {"name": "fsdp2"},
        "rollout": {"name": "hf"},
        "sampling": {"max_new_tokens": 8, "temperature": 1.0},
        "data": {"name": "arithmetic", "question_template": "{question}="},
        "rewards": [{"name": "numeric", "run": "inline"}],
        "algorithm": {"steps": 2, "prompts_per_step": 2, "samples_per_prompt": 4},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"export": False},
        "writers": ["jsonl"],
    }
    for section, value in overrides.items():
        recipe[section] = _merged(recipe.get(section), value)
    return recipe


def write_recipe_file(path: Path, recipe: Mapping[str, Any]) -> Path:
    """Write a recipe's plain values to `path` (JSON is YAML too); returned."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    return path


def _merged(default: Any, value: Any) -> Any:
    if not isinstance(default, dict) or not isinstance(value, Mapping):
        return dict(value) if isinstance(value, Mapping) else value
    if "name" in default and value.get("name", default["name"]) != default["name"]:
        return dict(value)
    return {**default, **{key: _merged(default.get(key), v) for key, v in value.items()}}
