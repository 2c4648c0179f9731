"""What belongs to a model beside its weights: config, tokenizer, generation config, chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from mmrl_core.checkpoint.matching import Wanted, wanted_of
from mmrl_core.errors import ModelError

STORED_IN = "hf"
"""Subfolder for these files in formats that have no place for them."""

DIGESTS = "mmrl_weights.json"
"""The file with the digests of a converted folder's tensors."""

_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".bpe"}
_LARGEST = 256 << 20


def read_config(folder: Path) -> dict[str, Any]:
    """The content of the folder's config.json. Raises ModelError."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: the model's config cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file}: the model's config is a {type(config).__name__}, not a mapping")
    return config


def is_diffusers(config: dict[str, Any]) -> bool:
    """Whether the config is of a network of diffusers rather than of transformers."""
    return "_class_name" in config


def model_files_in(folder: Path) -> Path | None:
    """The subfolder in which `copy_model_files` stored a model's config, or None."""
    stored = folder / STORED_IN
    return stored if (stored / "config.json").is_file() else None


def copy_model_files(model: Path | None, folder: Path, *, into: str = STORED_IN) -> None:
    """Copy everything but weights from a model's folder into `folder/into`; nothing when there is none."""
    if model is None:
        return
    target = folder / into
    target.mkdir(exist_ok=True)
    for file in sorted(model.iterdir()):
        described = file.name.endswith(".index.json") or file.name == DIGESTS or file.name.startswith(".")
        if file.suffix in _SUFFIXES and not described and file.is_file() and file.stat().st_size <= _LARGEST:
            shutil.copyfile(file, target / file.name)


def wanted_by(model: Path) -> list[Wanted]:
    """The names and shapes of a model's weights, from its config alone. Raises ModelError."""
    config = read_config(model)
    try:
        with torch.device("meta"):
            network = _diffusers(config) if is_diffusers(config) else _transformers(model)
    except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        raise ModelError(f"{model}: no model can be built from its config.json: {error}") from error
    return wanted_of(network, lambda name: name)


def _transformers(model: Path) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(model)
    named = next((getattr(transformers, name, None) for name in config.architectures or ()), None)
    network = named(config) if named is not None else transformers.AutoModelForCausalLM.from_config(config)
    network.tie_weights()
    return network


def _diffusers(config: dict[str, Any]) -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise ModelError(
            f"a {config['_class_name']} is a network of diffusers, which is not installed. "
            "Cure: pip install 'mmrl-core[diffusion]'"
        ) from error
    return getattr(diffusers, config["_class_name"]).from_config(config)
