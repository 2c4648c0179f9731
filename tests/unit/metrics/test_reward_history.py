"""The plain file of mean rewards: line n is step n, after resumes and crashes too, and nobody's data is lost."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from mmrl_core.errors import ObserverError
from mmrl_core.metrics.options import RewardHistoryOptions
from mmrl_core.metrics.reward_history import RewardHistoryWriter, read_history


def play(run_dir: Path, first: int, last: int, *, end: bool = True, path: str = "reward_history.txt") -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    writer: Any = RewardHistoryWriter(RewardHistoryOptions(path=path))
    writer.mmrl_run_start(recipe=None, run_dir=str(run_dir), first_step=first)
    for step in range(first, last + 1):
        writer.mmrl_step_end(step=step, metrics={"grpo/score/mean": step / 3}, samples=[])
    if end:
        writer.mmrl_run_end(summary={"outcome": "finished"})


def steps(*numbers: int) -> str:
    return "".join(f"{n / 3!r}\n" for n in numbers)


def test_one_number_a_line(tmp_path: Path) -> None:
    play(tmp_path, 1, 3, end=False)
    assert (tmp_path / "reward_history.txt").read_text() == steps(1, 2, 3), "readable while the run goes on"
    assert read_history(tmp_path / "reward_history.txt") == [1 / 3, 2 / 3, 1.0]


def test_a_step_without_scores_is_no_number_and_keeps_its_line(tmp_path: Path) -> None:
    writer: Any = RewardHistoryWriter(RewardHistoryOptions())
    writer.mmrl_run_start(recipe=None, run_dir=str(tmp_path), first_step=1)
    for metrics in ({}, {"grpo/score/mean": -0.5}):
        writer.mmrl_step_end(step=1, metrics=metrics, samples=[])
    writer.mmrl_run_end(summary={})
    first, second = read_history(tmp_path / "reward_history.txt")
    assert math.isnan(first)
    assert second == -0.5
    play(tmp_path, 3, 3)
    assert len(read_history(tmp_path / "reward_history.txt")) == 3


@pytest.mark.parametrize("torn", ["", "0.33", "-", "1e-0", "na", "\0\0\0"])
def test_a_resume_cuts_the_steps_that_are_done_again(tmp_path: Path, torn: str) -> None:
    play(tmp_path, 1, 5, end=False)
    with (tmp_path / "reward_history.txt").open("a") as file:
        file.write(torn)
    play(tmp_path, 4, 6)
    assert (tmp_path / "reward_history.txt").read_text() == steps(1, 2, 3, 4, 5, 6)
    assert [p.name for p in tmp_path.iterdir()] == ["reward_history.txt"]


def test_a_run_that_died_before_its_first_checkpoint_starts_over(tmp_path: Path) -> None:
    play(tmp_path, 1, 2, end=False)
    play(tmp_path, 1, 1)
    assert (tmp_path / "reward_history.txt").read_text() == steps(1)
    assert [p.name for p in tmp_path.iterdir()] == ["reward_history.txt"]


@pytest.mark.parametrize("path", ["hps/rewards.txt", "../shared/rewards.txt", "{absolute}/rewards.txt"])
def test_other_places(tmp_path: Path, path: str) -> None:
    path = path.format(absolute=tmp_path / "elsewhere")
    play(tmp_path / "run", 1, 3, end=False, path=path)
    play(tmp_path / "run", 3, 4, path=path)
    assert (tmp_path / "run" / path).read_text() == steps(1, 2, 3, 4)


def test_the_history_of_another_run_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shared = str(tmp_path / "rewards.txt")
    play(tmp_path / "one", 1, 3, path=shared)
    play(tmp_path / "two", 1, 2, path=shared)
    play(tmp_path / "three", 1, 1, path=shared)
    assert (tmp_path / "rewards.txt").read_text() == steps(1)
    assert (tmp_path / "rewards.txt.1").read_text() == steps(1, 2, 3)
    assert (tmp_path / "rewards.txt.2").read_text() == steps(1, 2)
    assert "rewards.txt.1" in caplog.text


@pytest.mark.parametrize("first", [1, 3])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(
    "content", ["0.5\nhello\n0.5\n", '{"step": 1}\n' * 5, "0.5\n0.5\n0.5\nnotes to self", "\n\n\n"]
)
def test_a_file_that_is_no_history_is_left_alone(tmp_path: Path, first: int, inside: bool, content: str) -> None:
    path = tmp_path / "run" / "file.txt" if inside else tmp_path / "file.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    with pytest.raises(ObserverError, match=r"file\.txt:[124]: .*Cure"):
        play(tmp_path / "run", first, first, path=str(path))
    assert path.read_text() == content
    assert [p.name for p in path.parent.iterdir() if p.is_file()] == ["file.txt"]


@pytest.mark.parametrize("content", ["", "0.5\n", "0.5\n0.25"])
def test_too_few_lines_on_a_resume(tmp_path: Path, content: str) -> None:
    (tmp_path / "reward_history.txt").write_text(content)
    with pytest.raises(ObserverError, match=r"holds [01] whole lines, but 2 steps are done.*Cure"):
        play(tmp_path, 3, 3)
    assert (tmp_path / "reward_history.txt").read_text() == content


def test_no_file_on_a_resume(tmp_path: Path) -> None:
    with pytest.raises(ObserverError, match=r"reward_history\.txt: .*cannot be read"):
        play(tmp_path, 3, 3)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_never_started_ends_quietly() -> None:
    RewardHistoryWriter(RewardHistoryOptions()).mmrl_run_end(summary={"outcome": "failed"})
