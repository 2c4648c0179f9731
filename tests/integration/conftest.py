"""Real runs of the command line on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

RECIPE = """
name: tiny
device: cpu
model: {{path: {model}}}
backend: {{name: fsdp2, micro_batch_groups: 2}}
rollout: hf
sampling: {{max_new_tokens: 6}}
data: {{name: arithmetic, largest: 9}}
rewards:
  - {{name: numeric, run: inline, format_weight: 0.25}}
  - {{name: length, run: inline, maximum: 1, ramp: 5, weight: 0.5}}
algorithm: {{steps: 4, prompts_per_step: 3, samples_per_prompt: 4}}
optimizer: {{lr: 1e-3}}
writers: [console, jsonl]
"""


@dataclass(frozen=True)
class Finished:
    """A command that ended."""

    status: int
    out: str
    err: str

    @property
    def all(self) -> str:
        return self.out + self.err


@dataclass(frozen=True)
class Workshop:
    """A folder with a tiny model and a recipe, and ways to run `mmrl` in it."""

    folder: Path
    recipe: Path
    model: Path

    def environment(self, **extra: str) -> dict[str, str]:
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MMRL_PLUGINS")}
        return {**env, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **extra}

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "mmrl_core.cli.main", *arguments]

    def mmrl(self, *arguments: str, timeout: float = 240, **env: str) -> Finished:
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment(**env),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    def train(self, run: str, *overrides: str, check: bool = True, **env: str) -> Finished:
        """`mmrl train` into the run folder `run`."""
        done = self.mmrl("train", str(self.recipe), f"run_dir={run}", *overrides, **env)
        if check:
            assert done.status == 0, done.all
        return done

    def metrics(self, run: str) -> list[dict[str, Any]]:
        text = (self.folder / run / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def weights(self, run: str) -> dict[str, Any]:
        from safetensors.torch import load_file

        return dict(load_file(self.folder / run / "export" / "model.safetensors"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mmrl_core.testing.tiny import tiny_language_model

    return tiny_language_model(
        tmp_path_factory.mktemp("models") / "tiny-llama", end_tokens="abcdefghijklmnopqrstuvwxyz0123456789"
    )


@pytest.fixture
def workshop(tmp_path: Path, tiny_model: Path) -> Workshop:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=tiny_model), encoding="utf-8")
    return Workshop(tmp_path, recipe, tiny_model)


@pytest.fixture(scope="module")
def shared_workshop(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Workshop:
    folder = tmp_path_factory.mktemp("workshop")
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=tiny_model), encoding="utf-8")
    return Workshop(folder, recipe, tiny_model)


@pytest.fixture
def install(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Make a distribution with one module appear installed; returns the environment variables that do it."""

    def make(name: str, source: str, entry: str = "plugin", metadata: str = "") -> dict[str, str]:
        site = tmp_path / "site"
        module = name.replace("-", "_")
        (site / module).mkdir(parents=True, exist_ok=True)
        (site / module / "__init__.py").write_text("", encoding="utf-8")
        (site / module / "plugin.py").write_text(source, encoding="utf-8")
        info = site / f"{module}-0.3.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.3\n{metadata}", encoding="utf-8"
        )
        (info / "entry_points.txt").write_text(f"[mmrl]\n{name} = {module}.{entry}\n", encoding="utf-8")
        return {"PYTHONPATH": str(site)}

    return make
