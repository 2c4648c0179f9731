"""The Qwen2-VL folder beside HPSv3's checkpoint: configuration, tokenizer and image processor, without weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrl_core.errors import RewardError
from mmrl_hpsv3.prompt import IMAGE_TOKEN, REWARD_TOKEN

CURE = (
    "Cure: `hf download Qwen/Qwen2-VL-7B-Instruct --include '*.json' merges.txt --local-dir FOLDER` "
    "(without weights) and name FOLDER as `base`"
)


@dataclass(frozen=True, kw_only=True)
class Base:
    """What the folder holds, loaded."""

    folder: Path
    """Where it is."""
    config: Any
    """transformers' `Qwen2VLConfig`."""
    tokenizer: Any
    """With the reward token added."""
    image_processor: Any
    """transformers' `Qwen2VLImageProcessorPil`."""
    reward_id: int
    """The reward token's id."""
    image_id: int
    """The image token's id."""
    pad_id: int
    """The id that fills short rows."""


def load_base(folder: Path) -> Base:
    """Load everything but weights. Raises RewardError saying what is missing or of another model."""
    if not folder.is_dir():
        raise RewardError(f"base {str(folder)!r} is no folder on this machine. {CURE}")
    _check_model_type(folder)
    config = _loading(folder, "config.json", lambda: _config(folder))
    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        raise RewardError(f"{folder}: there is no tokenizer (tokenizer.json, or vocab.json with merges.txt). {CURE}")
    tokenizer = _loading(folder, "the tokenizer", lambda: _tokenizer(folder))
    if not (folder / "preprocessor_config.json").is_file():
        raise RewardError(f"{folder}: there is no preprocessor_config.json. {CURE}")
    image_processor = _loading(folder, "preprocessor_config.json", lambda: _image_processor(folder))
    _check_patches(folder, config.vision_config, image_processor)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if image_id != config.image_token_id:
        raise RewardError(
            f"{folder}: {IMAGE_TOKEN} is token {image_id} of the tokenizer but token {config.image_token_id} in "
            f"config.json; the files belong to different models. {CURE}"
        )
    if tokenizer.pad_token_id is None:
        raise RewardError(f"{folder}: the tokenizer names no padding token. {CURE}")
    return Base(
        folder=folder,
        config=config,
        tokenizer=tokenizer,
        image_processor=image_processor,
        reward_id=tokenizer.convert_tokens_to_ids(REWARD_TOKEN),
        image_id=image_id,
        pad_id=tokenizer.pad_token_id,
    )


def _check_model_type(folder: Path) -> None:
    file = folder / "config.json"
    try:
        stated = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RewardError(f"{file} cannot be read: {error}. {CURE}") from error
    except ValueError as error:
        raise RewardError(f"{file} is no JSON: {error}. {CURE}") from error
    model_type = stated.get("model_type") if isinstance(stated, dict) else None
    if model_type == "qwen2_5_vl":
        raise RewardError(
            f"{folder} is a Qwen2.5-VL model; HPSv3 is trained from Qwen2-VL, whose visual tower and tokenizer differ. "
            f"{CURE}"
        )
    if model_type != "qwen2_vl":
        raise RewardError(f"{file}: model_type is {model_type!r}; HPSv3 is trained from a 'qwen2_vl' model. {CURE}")


def _config(folder: Path) -> Any:
    from transformers import Qwen2VLConfig

    return Qwen2VLConfig.from_pretrained(folder, local_files_only=True)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
    return tokenizer


def _image_processor(folder: Path) -> Any:
    try:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    except ImportError as error:
        import transformers

        raise RewardError(
            f"transformers {transformers.__version__} has no Qwen2VLImageProcessorPil, the image processor that needs "
            f"no torchvision: {error}. Cure: pip install 'transformers>=5.4' pillow"
        ) from error
    return Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)


def _check_patches(folder: Path, vision: Any, image_processor: Any) -> None:
    cut = (image_processor.patch_size, image_processor.temporal_patch_size, image_processor.merge_size)
    wanted = (vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size)
    if cut != wanted or cut[0] * cut[2] != 28:
        raise RewardError(
            f"{folder}: patch, temporal patch and merge sizes are {cut} in preprocessor_config.json and {wanted} in "
            f"config.json; both are (14, 2, 2) for Qwen2-VL. {CURE}"
        )


def _loading(folder: Path, what: str, load: Any) -> Any:
    try:
        return load()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise RewardError(f"{folder}: cannot load {what}: {type(error).__name__}: {error}. {CURE}") from error
