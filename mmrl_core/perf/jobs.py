"""The fixed work that a combination is measured on: models, sizes, recipes. Imports torch only to make a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Modality = Literal["text", "image"]
MODALITIES: tuple[Modality, ...] = ("text", "image")

PHASES = ("rollout", "old_log_p", "reference_model", "update", "resharding_to_infer", "all")
"""What is measured of a step, as in `timing/PHASE`. `all` is the whole step, with what is not listed in it."""

PROMPTS = ("fox", "boat", "bridge", "snow")
"""What the pictures are of: the classes of the random network."""

_SMOLLM2 = "mmrl:smollm2-135m-instruct"


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the measured models are, and how long to measure them."""

    models: Mapping[Modality, str]
    """What people call each model; no entry: there is none of this size."""
    steps: int
    """Steps whose time counts, of each process."""
    warmup: int
    """Steps before them: allocation of optimizer state, page faults, lazy initialisation."""


SIZES = {
    "tiny": Size(models={"text": "random llama, 2 x 64", "image": "random DiT, 4 x 96"}, steps=20, warmup=3),
    "smollm2": Size(models={"text": "SmolLM2-135M-Instruct"}, steps=5, warmup=1),
}
"""tiny: random models whose time is almost only the framework's own. smollm2: a real model, almost only arithmetic."""

DEFAULT_TOKENS = 16


def model_folder(size: str, modality: Modality, folder: Path) -> str:
    """Write, or fetch, the model of a size; returns its path. The same bytes every time."""
    if SIZES[size].models[modality].startswith("SmolLM2"):
        from mmrl_core.packaged_models import local_path

        return local_path(_SMOLLM2)
    target = folder / modality
    if not target.exists():
        _text_model(target) if modality == "text" else _image_model(target)
    return str(target)


def recipe_values(
    modality: Modality, *, device: str, backend: str, rollout: Mapping[str, Any], model: str, tokens: int, folder: Path
) -> dict[str, Any]:
    """The recipe of a combination: every phase happens in every step, and the work never depends on what is sampled.

    There is a KL term, so that there is a reference pass; old log-probs are recomputed; every text sample has exactly
    `tokens` new tokens.
    """
    algorithm: dict[str, Any] = {
        "steps": 1_000_000,
        "prompts_per_step": len(PROMPTS),
        "samples_per_prompt": 8,
        "old_log_probs": "recompute",
        "kl": {"coef": 0.01},
    }
    values: dict[str, Any] = {
        "name": "perf",
        "run_dir": str(folder),
        "device": device,
        "launcher": "local",
        "backend": backend,
        "rollout": dict(rollout),
        "algorithm": algorithm,
        "optimizer": {"lr": 1e-6},
        "checkpoint": {"export": False, "resume": "never"},
        "writers": [],
    }
    return values | (_text(model, tokens) if modality == "text" else _image(model, folder))


def work(values: Mapping[str, Any]) -> dict[str, Any]:
    """What shapes the work of a step, from the recipe's values: measurements of other work are not compared."""
    algorithm = values["algorithm"]
    return {
        "prompts": algorithm["prompts_per_step"],
        "samples": algorithm["samples_per_prompt"],
        "dtype": values["model"]["dtype"],
        "sampling": values["sampling"],
    }


def _text(model: str, tokens: int) -> dict[str, Any]:
    return {
        "model": {"path": model, "dtype": "float32", "policy": "causal_lm"},
        "sampling": {"max_new_tokens": tokens, "temperature": 1.0, "ignore_eos": True},
        "data": {"name": "arithmetic", "operations": ["+"], "smallest": 10, "largest": 39},  # prompts of one length
        "rewards": [{"name": "numeric", "correct_weight": 0.5, "format_weight": 0.5, "run": "inline"}],
    }


def _image(model: str, folder: Path) -> dict[str, Any]:
    prompts = folder / "prompts.jsonl"
    prompts.parent.mkdir(parents=True, exist_ok=True)
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS), encoding="utf-8")
    return {
        "model": {"path": model, "dtype": "float32", "policy": "flow"},
        "sampling": {"steps": 6, "height": 8, "width": 8, "noise": 0.3, "trained_fraction": 0.6},
        "data": {"name": "jsonl", "path": str(prompts), "answer_column": None, "shuffle": False},
        "rewards": [{"name": "brightness", "run": "inline"}],
    }


def _text_model(folder: Path) -> None:
    from transformers.utils import logging

    from mmrl_core.testing.tiny import tiny_language_model

    logging.disable_progress_bar()
    tiny_language_model(folder)


def _image_model(folder: Path) -> None:
    import torch

    from mmrl_core.policies.flow.dit import ClassConditionalDiT, DitConfig, write_folder

    torch.manual_seed(0)
    config = DitConfig(classes=list(PROMPTS), sample_size=8, patch_size=2, width=96, depth=4, heads=4)
    network = ClassConditionalDiT(config)
    with torch.no_grad():  # a fresh adaLN-zero network answers 0 whatever it is asked
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    write_folder(folder, network, shift=3.0)
