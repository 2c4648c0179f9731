"""Makes package_scores.json: what the hpsv3 package itself says about a tiny checkpoint. Not run by the tests.

    python make_package_scores.py TINY HPSV3

TINY is a folder of `mmrl_hpsv3.tiny.write_tiny(folder, seed=0)`, HPSV3 the unpacked wheel of hpsv3 1.0.0. Run it in an
environment of its own with transformers==4.45.2, which hpsv3 pins, torch, numpy and Pillow. What hpsv3 imports and does
not use for scoring (trl, deepspeed, torchvision, ...) is replaced by empty modules.

`float32` are the scores with the package's network computed in float32, after the package itself has cast it to
bfloat16: the rotary tables keep that rounding. `bfloat16` are the scores of the network as the package leaves it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import shutil
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers
from PIL import Image
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Trainer, TrainingArguments  # noqa: F401

# chat_template.json of Qwen/Qwen2-VL-7B-Instruct
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPTS = ("a red dog on a beach", "a cat", "{braces} and ünïcode, 雪", "a photograph of two old friends " * 12)
SIZES = ((448, 448), (64, 64), (97, 333), (700, 301), (1, 1), (1201, 640), (20, 900), (447, 449))
CASES = [
    {"seed": seed, "height": height, "width": width, "prompt": PROMPTS[seed % len(PROMPTS)]}
    for seed, (height, width) in enumerate(SIZES)
]
UNUSED = (
    "torchvision",
    "trl",
    "peft",
    "datasets",
    "deepspeed",
    "fire",
    "omegaconf",
    "matplotlib",
    "pandas",
    "requests",
)


class Empty(types.ModuleType):
    """A module in which every name is an empty class."""

    __path__: list[str] = []  # noqa: RUF012
    __version__ = "0.20"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda *_, **__: None})


class EmptyModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes them."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in UNUSED else None

    def create_module(self, spec: Any) -> types.ModuleType:
        return Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


def without_weights(cls: Any, path: str, **given: Any) -> Any:
    """`from_pretrained` for a folder without weights: hpsv3 loads its own over them anyway."""
    names = ("output_dim", "reward_token", "special_token_ids", "rm_head_type", "rm_head_kwargs")
    config = Qwen2VLConfig.from_pretrained(path)
    config._attn_implementation = given["attn_implementation"]
    return cls(config, **{name: given[name] for name in names})


def inferencer(base: Path, checkpoint: Path) -> Any:
    """hpsv3's inferencer, put together as its constructor does from its YAML file."""
    from hpsv3 import train
    from hpsv3.inference import HPSv3RewardInferencer

    train.get_quantization_config = lambda _: None
    train.Qwen2VLRewardModelBT.from_pretrained = classmethod(without_weights)
    settings = {
        **{"torch_dtype": "bfloat16", "model_name_or_path": str(base), "model_revision": "main"},
        **{"use_special_tokens": True, "output_dim": 2, "reward_token": "special"},
        **{"rm_head_type": "ranknet", "rm_head_kwargs": None},
    }
    made = HPSv3RewardInferencer.__new__(HPSv3RewardInferencer)
    made.device, made.use_special_tokens = "cpu", True
    made.model, made.processor, _ = train.create_model_and_processor(
        model_config=types.SimpleNamespace(**settings),
        peft_lora_config=types.SimpleNamespace(lora_enable=False),
        training_args=types.SimpleNamespace(disable_flash_attn2=True, bf16=True, fp16=False),
    )
    made.model.load_state_dict(safetensors.torch.load_file(checkpoint), strict=True)
    made.model.eval()
    return made


@torch.no_grad()
def scores(made: Any) -> list[list[float]]:
    """[mu, sigma] of every case, one call a case."""
    answers = []
    for case in CASES:
        shape = (case["height"], case["width"], 3)
        pixels = np.random.RandomState(case["seed"]).randint(0, 256, shape, dtype=np.uint8)
        answers += made.reward(image_paths=[Image.fromarray(pixels)], prompts=[case["prompt"]]).tolist()
    return answers


def main(tiny: Path, package: Path) -> None:
    sys.meta_path.insert(0, EmptyModules())
    sys.path.insert(0, str(package))
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        shutil.copytree(tiny / "Qwen2-VL", base)
        (base / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}), encoding="utf-8")
        made = inferencer(base, tiny / "HPSv3.safetensors")
    # on CUDA the package's autocast does this for the head
    made.model.rm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    rounded = scores(made)
    made.model.float()
    made.model.visual.rotary_pos_emb.to(torch.bfloat16)
    exact = scores(made)
    cases = [{**case, "float32": one, "bfloat16": two} for case, one, two in zip(CASES, exact, rounded, strict=True)]
    made_by = f"hpsv3 1.0.0, transformers {transformers.__version__}, torch {torch.__version__}"
    file = Path(__file__).with_name("package_scores.json")
    file.write_text(
        json.dumps({"made_by": made_by, "cases": cases}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
