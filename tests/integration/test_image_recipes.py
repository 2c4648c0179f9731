"""The image and video recipes as they are, on tiny random pipelines: training, two ranks, kill and resume, adapters,
other weights to start from."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import state_dict_saver

from mmrl_core.cli import main as cli

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "plugins" / "mmrl-hpsv2" / "tests"))

PROMPTS = "a red cat\na blue dog\na green bird\nseven\n"
SMALL = ("device=cpu", "algorithm.steps=2", "algorithm.prompts_per_step=2", "sampling.steps=4")
TOKENS = "24"
"""Length of prompts for the networks; 512 by default, which is most of the work of tiny ones."""


@dataclass(frozen=True)
class Studio:
    """A folder with tiny pipelines, tiny reward checkpoints and embedded prompts."""

    folder: Path

    def environment(self) -> dict[str, str]:
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MMRL_PLUGINS")}
        return {**env, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "mmrl_core.cli.main", *arguments]

    def mmrl(self, *arguments: str) -> str:
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def flux(self, run: str, *changes: str, processes: int = 1, dtype: str = "float32") -> list[str]:
        return [
            *("train", str(ROOT / "recipes" / "flux_dancegrpo.yaml"), f"run_dir={run}", *SMALL),
            *("model.path=flux", f"model.dtype={dtype}", "data.path=emb", "eval.data.path=emb", "eval.prompts=2"),
            *("sampling.height=32", "sampling.width=48", "algorithm.samples_per_prompt=3", "eval.every=1"),
            *("rewards.0.checkpoint=hps.pt", "rewards.0.tokenizer=tok", "rewards.0.vision_head_width=20"),
            *("rewards.0.text_heads=2", f"launcher.processes={processes}", *changes),
        ]

    def wan(self, command: str, *changes: str) -> list[str]:
        return [
            *(command, str(ROOT / "recipes" / "wan22_dancegrpo.yaml"), *SMALL, "model.path=wan"),
            *("model.dtype=float32", "data.path=p.parquet", "sampling.height=64", "sampling.width=96"),
            *("sampling.frames=5", "algorithm.samples_per_prompt=2", f"model.policy.max_text_tokens={TOKENS}"),
            *("rewards.0.checkpoint=hps3/HPSv3.safetensors", "rewards.0.base=hps3/Qwen2-VL", *changes),
        ]

    def weights(self, run: str) -> dict[str, torch.Tensor]:
        return self.stored(f"{run}/export")

    def stored(self, model: str) -> dict[str, torch.Tensor]:
        (file,) = (self.folder / model / "transformer").glob("*.safetensors")
        return dict(load_file(file))

    def metrics(self, run: str) -> list[dict[str, Any]]:
        import json

        lines = (self.folder / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    import hpsv2_tiny
    from mmrl_hpsv3.tiny import write_tiny

    from mmrl_core.testing.tiny_pipelines import tiny_pipeline

    folder = tmp_path_factory.mktemp("studio")
    tiny_pipeline(folder / "flux", "flux")
    tiny_pipeline(folder / "wan", "wan22")
    hpsv2_tiny.write_checkpoint(folder / "hps.pt", hpsv2_tiny.parameters())
    hpsv2_tiny.write_tokenizer(folder / "tok")
    write_tiny(folder / "hps3")
    (folder / "p.txt").write_text(PROMPTS, encoding="utf-8")
    made = Studio(folder)
    text, table, stored = (str(folder / name) for name in ("p.txt", "p.parquet", "emb"))
    assert cli.main(["data", "prompts", text, table]) == 0
    embed = ["data", "embed", text, stored, "--model", str(folder / "flux"), "--max-text-tokens", TOKENS]
    assert cli.main([*embed, "--dtype", "float32", "--device", "cpu"]) == 0
    made.mmrl(*made.flux("whole"))
    return made


def test_flux_trains_evaluates_and_exports(studio: Studio) -> None:
    rows = studio.metrics("whole")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(np.isfinite(row["grpo/score/mean"]) and row["grad_norm"] > 0 for row in rows)
    assert rows[0]["mismatch/log_prob_diff_max"] < 1e-4
    folder = studio.folder / "whole"
    for name in ("eval_000000.png", "eval_000001.png", "eval_000002.png"):
        assert (folder / "images" / name).is_file(), "pictures before, during and after"
    history = [float(line) for line in (folder / "hps_reward.txt").read_text().split()]
    assert history == pytest.approx([row["grpo/score/mean"] for row in rows])
    from diffusers import FluxPipeline

    FluxPipeline.from_pretrained(folder / "export", local_files_only=True)


def test_two_ranks_learn_what_one_learns(studio: Studio) -> None:
    studio.mmrl(*studio.flux("two", processes=2))
    one, two = studio.weights("whole"), studio.weights("two")
    assert set(one) == set(two)
    # AdamW divides by the size of the gradient: where it is nearly 0 its sign is rounding, worth 2 lr an update
    assert max(float((one[n] - two[n]).abs().max()) for n in one) < 2e-6
    norms, expected = ([r["grad_norm"] for r in studio.metrics(name)] for name in ("two", "whole"))
    assert norms[0] == pytest.approx(expected[0], rel=1e-5)
    # after an update a pixel may round to the next of 256 values, and its reward follows
    assert norms == pytest.approx(expected, rel=1e-3)


def test_killed_and_resumed_is_the_whole(studio: Studio) -> None:
    arguments = studio.flux("killed", "checkpoint.every=1")
    process = subprocess.Popen(
        studio.command(*arguments),
        cwd=studio.folder,
        env=studio.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    first = studio.folder / "killed" / "checkpoints" / "step_00000001"
    until = time.monotonic() + 120
    while not first.is_dir() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the kill came too late"
    assert first.is_dir()
    assert "resuming after step" in studio.mmrl(*arguments)
    one, two = studio.weights("whole"), studio.weights("killed")
    assert all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_adapters_on_other_weights_in_bfloat16_on_two_ranks(studio: Studio) -> None:
    """Training starts from `model.init_from`, and so does the reference: only what adapters change is not its own."""
    original = studio.stored("flux")
    start = {name: (tensor + 0.01).bfloat16() for name, tensor in original.items()}
    state_dict_saver.save({"model": start}, checkpoint_id=studio.folder / "dcp", no_dist=True)
    changes = (
        "model.init_from=dcp",
        "model.lora={rank: 4, alpha: 8}",
        "algorithm.kl.coef=0.01",
        "algorithm.minibatches=1",
        "optimizer.lr=1e-2",
    )
    studio.mmrl(*studio.flux("lora", *changes, processes=2, dtype="bfloat16"))
    rows = studio.metrics("lora")
    assert rows[0]["actor/kl_loss"] == pytest.approx(0, abs=1e-6)
    assert rows[1]["actor/kl_loss"] > 0
    assert all(np.isfinite(row["grad_norm"]) for row in rows)
    trained = studio.weights("lora")
    assert set(trained) == set(start)
    same = {name for name in trained if torch.equal(trained[name].bfloat16(), start[name])}
    assert {name for name in trained if name.endswith("bias")} <= same
    assert any(name.endswith("to_q.weight") for name in set(trained) - same)
    assert not any(torch.equal(trained[name].float(), original[name].float()) for name in trained)


@pytest.mark.parametrize("processes", [1, 2])
def test_wan_trains(studio: Studio, processes: int) -> None:
    run = f"wan-{processes}"
    studio.mmrl(*studio.wan("train", f"run_dir={run}", f"launcher.processes={processes}"))
    assert all(row["grad_norm"] > 0 for row in studio.metrics(run))


def test_wan_rollouts_are_video_files(studio: Studio) -> None:
    studio.mmrl(*studio.wan("rollout"), "--prompts", "2", "--output", "videos")
    from mmrl_core.media.videos import read_video

    files = sorted((studio.folder / "videos" / "videos").glob("*.mp4"))
    assert len(files) == 4
    assert read_video(files[0])[0].shape == (5, 64, 96, 3)
    assert (studio.folder / "videos" / "contact_sheet.png").is_file()
