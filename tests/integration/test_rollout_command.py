"""`mmrl rollout`: samples without training, saved as they come."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmrl_core.cli import main as cli
from mmrl_core.grpo.collect import seed_of
from mmrl_core.media.images import read_image
from mmrl_core.media.videos import read_video
from mmrl_core.testing.tiny import write_recipe_file
from mmrl_core.testing.tiny_pipelines import tiny_pipeline

REWARDS = """
import time
from mmrl_core import Component, hookimpl, reward

mmrl_api = 1

@reward
def sometimes(sample):
    if sample.sample_id % 4 == 1:
        raise ValueError("every fourth fails")
    return float(sample.sample_id % 4)

@reward
def slow(sample):
    time.sleep(0.05)
    return float(len(sample.text or "") % 3)

@hookimpl
def mmrl_rewards():
    return [Component(name=n, summary=n, target=f"{__name__}:{n}") for n in ("sometimes", "slow")]
"""


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def here(workshop: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The workshop, as the working directory."""
    monkeypatch.chdir(workshop.folder)
    return workshop


def rollout(*arguments: str, status: int = 0) -> None:
    assert cli.main(["rollout", *arguments]) == status


# ---------------------------------------------------------------------------------------------------------------- texts


def test_texts_with_prompts_and_rewards(here: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rollout("recipe.yaml", "run_dir=run", "seed=3")
    folder = here.folder / "run" / "rollouts"
    rows = rows_of(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["rollouts.jsonl", "settings.json"]
    assert [(row["sample_id"], row["group_id"], row["sample"]) for row in rows] == [
        (4 * group + n, group, n) for group in range(3) for n in range(4)
    ]
    assert [row["seed"] for row in rows] == [seed_of(3, 0, i) for i in range(12)]
    for row in rows:
        assert row["prompt"].startswith("What is ")
        assert row["origin"].startswith("arithmetic: ")
        assert isinstance(row["text"], str)
        assert row["file"] is None
        assert row["failure"] is None
        numeric, length = row["rewards"]["numeric"], row["rewards"]["length"]
        assert row["reward"] == pytest.approx(numeric + 0.5 * length)
    assert len({row["prompt"] for row in rows}) == 3
    said = capsys.readouterr().out
    mean = sum(row["reward"] for row in rows) / 12
    assert "3 prompts, 12 samples" in said
    assert f"reward     {mean:.4f}" in said
    assert f"  length   {sum(row['rewards']['length'] for row in rows) / 12:.4f}" in said
    assert "contact_sheet" not in said


def test_more_prompts_of_the_same_settings(here: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rollout("recipe.yaml", "--output", "out", "--prompts", "2", "--samples", "3")
    before = (here.folder / "out" / "rollouts.jsonl").read_bytes()
    rollout("recipe.yaml", "--output", "out", "--prompts", "5", "--samples", "3")
    assert "5 prompts, 15 samples (2 prompts were there before)" in capsys.readouterr().out
    after = (here.folder / "out" / "rollouts.jsonl").read_bytes()
    assert after.startswith(before)
    assert [row["sample_id"] for row in rows_of(here.folder / "out")] == list(range(15))
    rollout("recipe.yaml", "--output", "out", "--prompts", "1", "--samples", "3")
    assert (here.folder / "out" / "rollouts.jsonl").read_bytes() == after


def test_other_settings_are_refused(here: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rollout("recipe.yaml", "--output", "out", "--prompts", "1")
    before = (here.folder / "out" / "rollouts.jsonl").read_bytes()
    capsys.readouterr()
    rollout("recipe.yaml", "sampling.temperature=0.5", "--output", "out", "--samples", "2", status=1)
    said = capsys.readouterr().err
    for words in ("sampling.temperature: 1.0 -> 0.5", "samples_per_prompt: 4 -> 2", "--overwrite"):
        assert words in said
    assert (here.folder / "out" / "rollouts.jsonl").read_bytes() == before
    rollout("recipe.yaml", "sampling.temperature=0.5", "--output", "out", "--samples", "2", "--overwrite")
    assert len(rows_of(here.folder / "out")) == 6
    (here.folder / "thesis").mkdir()
    (here.folder / "thesis" / "chapter1.tex").write_text("years of work")
    for extra in ([], ["--overwrite"]):
        rollout("recipe.yaml", "--output", "thesis", *extra, status=1)
        assert "is not empty, and holds no rollouts" in capsys.readouterr().err


def test_all_prompts_of_a_file_and_the_eval_section(here: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (here.folder / "p.jsonl").write_text("".join(f'{{"prompt": "{n}+1", "answer": "{n + 1}"}}\n' for n in range(5)))
    rollout("recipe.yaml", "data={name: jsonl, path: p.jsonl}", "--prompts", "all", "--samples", "1")
    assert {row["prompt"] for row in rows_of(here.folder / "runs/tiny/rollouts")} == {f"{n}+1" for n in range(5)}
    held_out = (
        "eval={data: {name: arithmetic, split: test}, prompts: 4, samples_per_prompt: 2, sampling: {temperature: 1}}"
    )
    rollout("recipe.yaml", held_out, "--eval")
    rows = rows_of(here.folder / "runs/tiny/rollouts_eval")
    assert len(rows) == 8
    capsys.readouterr()
    assert cli.main(["eval", "recipe.yaml", held_out, "--model", str(here.model), "--output", "scores.json"]) == 0
    scores = json.loads((here.folder / "scores.json").read_text())
    assert scores["questions"] == [row["prompt"] for row in rows[::2]]
    assert scores["models"][0]["texts"] == [row["text"] for row in rows[::2]], "the same samples as in evaluation"
    two = ["eval", str(here.recipe), held_out, "launcher={name: local, processes: 2}", "--model", str(here.model)]
    done = here.mmrl(*two, "--output", "of_two.json")
    assert done.status == 0, done.all
    assert done.out.count("held-out prompts") == 1
    assert json.loads((here.folder / "of_two.json").read_text()) == scores
    rollout("recipe.yaml", "--eval", status=2)
    assert "needs an `eval` section" in capsys.readouterr().err


def test_failed_rewards_are_recorded(
    here: Any, install: Callable[..., dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    env = install("odd-rewards", REWARDS)
    rewards = "rewards=[{name: sometimes, run: inline, on_failure: stop}, {name: length, run: inline, maximum: 9}]"
    done = here.mmrl("rollout", str(here.recipe), rewards, "--output", "out", **env)
    assert done.status == 0, done.all
    rows = rows_of(here.folder / "out")
    for row in rows:
        if row["sample_id"] % 4 == 1:
            assert row["reward"] is None
            assert "every fourth fails" in row["failure"]
            assert set(row["rewards"]) == {"length"}
        else:
            assert row["failure"] is None
            assert row["rewards"]["sometimes"] == row["sample_id"] % 4
    good = [row["reward"] for row in rows if row["reward"] is not None]
    assert f"reward       {sum(good) / 9:.4f}" in done.out
    assert "failed  3 of 12 samples; the first: " in done.out
    assert "every fourth fails" in done.out


def test_a_killed_command_goes_on(here: Any, install: Callable[..., dict[str, str]]) -> None:
    env = here.environment(**install("odd-rewards", REWARDS))
    slow = [
        "rollout",
        str(here.recipe),
        "rewards=[{name: slow, run: inline}]",
        "--prompts",
        "30",
        "--batch-prompts",
        "1",
    ]
    command = here.command(*slow, "--output", "out")
    file = here.folder / "out" / "rollouts.jsonl"
    process = subprocess.Popen(command, cwd=here.folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        if file.exists() and file.read_bytes().count(b"\n") >= 12:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, said.decode()
    kept = file.read_bytes()
    assert 12 <= kept.count(b"\n") < 120, "it was not in the middle"

    # a crash may also tear a line, or leave a prompt with some of its samples only
    lines = kept.split(b"\n")
    file.write_bytes(b"\n".join([*lines[:2], *lines[4:10]]) + b'\n{"sample_id": 4')
    run = lambda *more: subprocess.run(  # noqa: E731
        here.command(*slow, *more), cwd=here.folder, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    resumed = run("--output", "out")
    assert resumed.returncode == 0, resumed.stderr
    assert "30 prompts, 120 samples (1 prompts were there before)" in resumed.stdout
    whole = run("--output", "at-once")
    assert whole.returncode == 0, whole.stderr
    assert file.read_bytes() == (here.folder / "at-once" / "rollouts.jsonl").read_bytes()


def test_a_damaged_line_is_named(here: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rollout("recipe.yaml", "--output", "out", "--prompts", "1")
    file = here.folder / "out" / "rollouts.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], "{oops", *lines[2:]]) + "\n")
    rollout("recipe.yaml", "--output", "out", status=1)
    assert "rollouts.jsonl:2: not a row" in capsys.readouterr().err


def test_two_ranks_share_the_prompts(here: Any) -> None:
    """Those of torchrun whatever the recipe's launcher says, or the launcher's own."""
    rollout("recipe.yaml", "--output", "alone", "--prompts", "5")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    two = ["rollout", str(here.recipe), "launcher={name: local, processes: 2}", "--output", "two", "--prompts", "5"]
    done = subprocess.run(
        [*torchrun, *here.command(*two)],
        cwd=here.folder,
        env=here.environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("5 prompts, 20 samples") == 1
    assert rows_of(here.folder / "two") == rows_of(here.folder / "alone")
    again = here.mmrl(*two, "data.largest=8")
    assert again.status != 0
    assert "data.largest: 9 -> 8" in again.err


# ------------------------------------------------------------------------------------------------------------- pictures


def picture_recipe(folder: Path, model: Path, name: str, **sections: Any) -> str:
    recipe = {
        "name": name,
        "device": "cpu",
        "model": {"path": str(model), "policy": {"name": "flow", "max_text_tokens": 24}},
        "rollout": "flow",
        "sampling": {"steps": 3, "height": 32, "width": 48},
        "rewards": [{"name": "brightness", "run": "inline"}],
        "algorithm": {"steps": 1, "prompts_per_step": 3, "samples_per_prompt": 2},
        **sections,
    }
    return str(write_recipe_file(folder / f"{name}.yaml", recipe))


def test_images_from_texts_and_from_embeddings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flux = tiny_pipeline(tmp_path / "flux", "flux")
    texts = [f"a picture of {n} dogs" for n in range(4)]
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    assert cli.main(["data", "prompts", "prompts.txt", "prompts.parquet"]) == 0
    embed = ["data", "embed", "prompts.parquet", "embedded", "--model", "flux", "--dtype", "float32"]
    assert cli.main([*embed, "--max-text-tokens", "24", "--device", "cpu", "--batch-size", "1"]) == 0
    raw = {"name": "parquet", "path": "prompts.parquet", "template": "raw", "answer_column": None, "shuffle": False}
    stored = {"name": "embedded_captions", "path": "embedded", "shuffle": False}
    rollout(picture_recipe(tmp_path, flux, "raw", data=raw))
    for part in ("text_encoder", "text_encoder_2"):  # stored embeddings need no encoder
        for file in (flux / part).glob("*.safetensors"):
            file.unlink()
    capsys.readouterr()
    rollout(picture_recipe(tmp_path, flux, "stored", data=stored))
    said = capsys.readouterr().out
    folder = tmp_path / "runs" / "stored" / "rollouts"
    rows = rows_of(folder)
    assert [row["file"] for row in rows] == [f"images/{group:06d}_{n:02d}.png" for group in range(3) for n in range(2)]
    assert [row["prompt"] for row in rows[::2]] == texts[:3]
    for row, other in zip(rows, rows_of(tmp_path / "runs" / "raw" / "rollouts"), strict=True):
        image = read_image(folder / row["file"])
        assert image.shape == (32, 48, 3)
        assert row["text"] is None
        assert row["reward"] == other["reward"]
        assert (image == read_image(tmp_path / "runs" / "raw" / "rollouts" / other["file"])).all()
    sheet = read_image(folder / "contact_sheet.png")
    assert sheet.shape[0] > 3 * 64
    assert sheet.shape[1] > 2 * 96
    assert "contact_sheet.png: all prompts" in said

    (folder / rows[2]["file"]).unlink()  # a picture that is gone is made again, with its group
    rollout("stored.yaml")
    assert "3 prompts, 6 samples (2 prompts were there before)" in capsys.readouterr().out
    assert rows_of(folder) == rows
    assert (folder / rows[2]["file"]).exists()
    (folder / "images" / "mine.txt").write_text("keep me")
    rollout("stored.yaml", "sampling.noise=0", "--overwrite", "--prompts", "1")
    assert sorted(path.name for path in (folder / "images").iterdir()) == ["000000_00.png", "000000_01.png", "mine.txt"]


def test_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("av", reason="pip install 'mmrl-core[video]'")
    monkeypatch.chdir(tmp_path)
    wan = tiny_pipeline(tmp_path / "wan", "wan21")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a dog runs"}\n{"prompt": "a cat sleeps"}\n')
    data = {"name": "jsonl", "path": "p.jsonl", "template": "raw", "answer_column": None}
    sampling = {"steps": 2, "height": 32, "width": 32, "frames": 5, "fps": 8}
    rollout(picture_recipe(tmp_path, wan, "film", data=data, sampling=sampling), "--prompts", "all")
    folder = tmp_path / "runs" / "film" / "rollouts"
    rows = rows_of(folder)
    assert [row["file"] for row in rows] == [f"videos/{group:06d}_{n:02d}.mp4" for group in range(2) for n in range(2)]
    frames, fps = read_video(folder / rows[3]["file"])
    assert frames.shape == (5, 32, 32, 3)
    assert fps == 8
    assert (folder / "contact_sheet.png").exists()
    assert not (folder / "images").exists()
