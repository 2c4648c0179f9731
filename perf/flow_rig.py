"""Recipes and model folders for measuring image and video training on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mmrl_core.policies.flow.dit import ClassConditionalDiT, DitConfig, write_folder

PROMPTS, GROUP, STEPS = 10, 16, 16
DIGITS = {"sample_size": 8, "patch_size": 2, "width": 96, "depth": 4, "heads": 4}
"""The network of the digits rows: 8 x 8 grey pixels, 0.7 million parameters."""


def dit_folder(folder: Path, **config: Any) -> Path:
    """Write a random class-conditional DiT of ten classes (see `DitConfig`); returned."""
    torch.manual_seed(0)
    network = ClassConditionalDiT(DitConfig(classes=[str(digit) for digit in range(10)], **{**DIGITS, **config}))
    with torch.no_grad():  # a fresh adaLN-zero network answers 0 whatever it is asked
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    write_folder(folder, network, shift=3.0)
    return folder


def flow_recipe(model: Path | str, folder: Path, /, **sections: Any) -> dict[str, Any]:
    """The combination cpu + fsdp2 + flow + brightness + flow, with the settings published for DanceGRPO: 16 steps, eta
    0.3, shift 3, 60 % of the steps trained, clip 1e-4, two updates on the engine's own log-probs.

    `sections` replace whole sections of the recipe.
    """
    prompts = folder / "prompts.jsonl"
    prompts.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"prompt": f"the digit {digit % 10}"}) + "\n" for digit in range(PROMPTS))
    prompts.write_text("".join(lines), encoding="utf-8")
    return {
        "name": "perf",
        "run_dir": str(folder / "run"),
        "device": "cpu",
        "launcher": "local",
        "model": {"path": str(model), "dtype": "float32", "policy": {"name": "flow"}},
        "backend": {"name": "fsdp2", "micro_batch_groups": PROMPTS // 2},
        "rollout": {"name": "flow", "weights": "shared"},
        "sampling": {
            "steps": STEPS,
            "height": 8,
            "width": 8,
            "shift": 3.0,
            "kernel": "dance",
            "noise": 0.3,
            "trained_fraction": 0.6,
        },
        "data": {"name": "jsonl", "path": str(prompts), "answer_column": None, "shuffle": False},
        "rewards": [{"name": "brightness", "run": "inline"}],
        "algorithm": {
            "steps": 100_000,
            "prompts_per_step": PROMPTS,
            "samples_per_prompt": GROUP,
            "minibatches": 2,
            "old_log_probs": "behaviour",
            "advantage": {"name": "grpo", "eps": 1e-8, "clamp": 5.0},
            "loss": {"name": "ppo_clip", "clip_low": 1e-4},
        },
        "optimizer": {"lr": 1e-4, "weight_decay": 1e-4, "clip_grad": 1.0, "schedule": "constant"},
        "writers": [],
        **sections,
    }
