"""Processes that see the emulated device of `emulator/`."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmrl_core.policies.flow.dit import ClassConditionalDiT, DitConfig, write_folder
from mmrl_core.testing.tiny import tiny_language_model, tiny_recipe, write_recipe_file
from mmrl_core.testing.tiny_pipelines import tiny_pipeline

HERE = Path(__file__).parent
EMULATOR = HERE / "emulator"
REFUSED = "float64,complex64,complex128,aten::digamma"
"""What the emulated device has not: types that NPUs have not or not for all operators, and one operator, to see that
refusing works."""
TIMEOUT_S = 900.0
"""Of one process; they take seconds on a machine that is not busy."""


def require_emulator() -> None:
    """Compile the device, once; skip, saying why, where that cannot be done."""
    spec = importlib.util.spec_from_file_location("npu_emulator_build", EMULATOR / "torch_npu" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    missing = build.missing()
    if missing is not None:
        pytest.skip(f"THE EMULATED NPU WAS NOT TESTED: {missing}")
    build.library()


def environment(**more: str) -> dict[str, str]:
    """This process's, with the emulated device in it."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MMRL_PLUGINS")}
    path = os.pathsep.join(filter(None, [str(EMULATOR), kept.get("PYTHONPATH")]))
    return {
        **kept,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "NPU_EMULATOR_REFUSE": REFUSED,
        **more,
    }


def python(*arguments: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """A Python process that has the device."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def tiny_text(model: Path) -> dict[str, Any]:
    """A recipe for a language model, which is written to `model`. Optimizer and attention are the defaults."""
    tiny_language_model(model, end_tokens="0123456789abcdef")
    rewards = [{"name": "length", "run": "inline", "maximum": 1, "ramp": 5}]
    return tiny_recipe(model, "unset", rewards=rewards, checkpoint={"export": True})


def tiny_dit(model: Path) -> dict[str, Any]:
    """The same for a small diffusion model of ours."""
    torch.manual_seed(0)
    network = ClassConditionalDiT(
        DitConfig(sample_size=8, width=32, depth=2, heads=2, classes=[str(d) for d in range(10)])
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    write_folder(model, network, shift=3.0)
    return _drawing(model, 8, 8)


def tiny_flux(model: Path) -> dict[str, Any]:
    """The same for a random FLUX.1 folder: text encoders, transformer, VAE."""
    return _drawing(tiny_pipeline(model, "flux"), 16, 32, max_text_tokens=8)


def _drawing(model: Path, height: int, width: int, **policy: Any) -> dict[str, Any]:
    recipe = tiny_recipe(
        model,
        "unset",
        model={"policy": {"name": "flow", **policy}},
        rollout={"name": "flow"},
        data={"name": "digits"},
        rewards=[{"name": "brightness", "run": "inline"}],
        checkpoint={"export": True},
    )
    recipe["sampling"] = {"steps": 4, "height": height, "width": width}
    return recipe


@dataclass(frozen=True)
class Workshop:
    """A folder with tiny models and one recipe for each, and runs of `mmrl train` in it."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Workshop:
        """A language model and FLUX."""
        for name, make in (("text", tiny_text), ("flux", tiny_flux)):
            write_recipe_file(folder / f"{name}.yaml", make(folder / name))
        return cls(folder)

    def trained(self, recipe: str, run: str, *overrides: str) -> Path:
        """`train`, unless that run has been made already."""
        done = (self.folder / run / "summary.json").is_file()
        return self.folder / run if done else self.train(recipe, run, *overrides)

    def train(self, recipe: str, run: str, *overrides: str) -> Path:
        """`mmrl train`; returns the run folder."""
        log = self.folder / f"{run}.operators"
        log.mkdir(exist_ok=True)
        command = ("-m", "mmrl_core.cli.main", "train", f"{recipe}.yaml", f"run_dir={run}", *overrides)
        done = python(*command, cwd=self.folder, NPU_EMULATOR_LOG=str(log))
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return self.folder / run

    def operators(self, run: str) -> set[str]:
        """Names of the operators that any process of a run called on the device, without `aten::`."""
        files = sorted((self.folder / f"{run}.operators").glob("*.json"))
        names = {name for file in files for name in json.loads(file.read_text(encoding="utf-8"))}
        return {name.removeprefix("aten::") for name in names}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of an exported model, or of a model's folder."""
    (file,) = [*folder.glob("*.safetensors"), *folder.glob("transformer/*.safetensors")]
    return dict(load_file(file))
