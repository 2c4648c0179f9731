"""What the writers leave behind, after resumes and crashes too."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pluggy
import pytest
from rich.console import Console

from mmrl_core.contracts import Prompt, Sample
from mmrl_core.errors import ObserverError
from mmrl_core.hookspecs import PROJECT, LifecycleHooks
from mmrl_core.metrics.console import ConsoleWriter, duration
from mmrl_core.metrics.jsonl import JsonlWriter, read_metrics
from mmrl_core.metrics.options import ConsoleOptions, JsonlOptions, TensorboardOptions, WandbOptions
from mmrl_core.metrics.picture import draw_progress, moving_average
from mmrl_core.metrics.tensorboard import TensorboardWriter
from mmrl_core.metrics.wandb import WandbWriter
from mmrl_core.recipe import Recipe

STEPS = 4

SUMMARY: dict[str, Any] = {
    "outcome": "finished",
    "steps": STEPS,
    "seconds": 3725.0,
    "first_reward": 0.25,
    "last_reward": 0.75,
    "tokens_per_second": 12345.6,
    "run_dir": "runs/demo",
    "checkpoint": "runs/demo/checkpoints/step_00000004",
    "export": "runs/demo/export",
    "picture": "runs/demo/progress.png",
    "eval": {
        "score": 0.5,
        "prompts": 8,
        "rewards": {"exact": 0.5},
        "first": {"score": 0.125, "rewards": {"exact": 0.125}},
    },
}


@pytest.fixture
def recipe() -> Recipe:
    return Recipe.model_validate(
        {
            "name": "demo",
            "model": {"path": "tiny"},
            "data": "arithmetic",
            "rewards": ["exact"],
            "algorithm": {"steps": STEPS, "prompts_per_step": 2, "samples_per_prompt": 2},
        }
    )


def metrics(step: int) -> dict[str, float]:
    return {
        "grpo/score/mean": 0.1 * step,
        "timing/all": 2.0,
        "perf/tokens": 5000.0,
        "response_length/mean": 14.25,
        "timing/rollout": 1.5,
    }


def sample(text: str = "[bold]4[/bold]") -> Sample:
    prompt = Prompt(index=0, messages=({"role": "user", "content": "What is *2+2*?"},), answer="4")
    return Sample(sample_id=0, group_id=0, prompt=prompt, text=text, score=0.62517)


def play(writer: Any, recipe: Recipe, run_dir: Path, first: int, last: int, end: bool = True) -> None:
    """Run the lifecycle hooks through pluggy, as the loop does."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(LifecycleHooks)
    manager.register(writer)
    manager.check_pending()
    manager.hook.mmrl_run_start(recipe=recipe, run_dir=str(run_dir), first_step=first)
    for step in range(first, last + 1):
        manager.hook.mmrl_step_end(step=step, metrics=metrics(step), samples=[sample()])
    if end:
        manager.hook.mmrl_run_end(summary=SUMMARY)


# ---------------------------------------------------------------------------------------------------------------- JSONL


def test_jsonl_rows(recipe: Recipe, tmp_path: Path) -> None:
    play(JsonlWriter(JsonlOptions()), recipe, tmp_path, 1, 3)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": step, **metrics(step)} for step in (1, 2, 3)]


def test_jsonl_is_readable_while_the_run_goes_on(recipe: Recipe, tmp_path: Path) -> None:
    play(JsonlWriter(JsonlOptions()), recipe, tmp_path, 1, 2, end=False)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_jsonl_is_standard_json(recipe: Recipe, tmp_path: Path) -> None:
    writer = JsonlWriter(JsonlOptions())
    writer.mmrl_run_start(recipe=recipe, run_dir=str(tmp_path), first_step=1)
    writer.mmrl_step_end(step=1, metrics={"a": math.nan, "b": math.inf, "c": 0.1 + 0.2}, samples=[])
    writer.mmrl_run_end(summary={})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "a": null, "b": null, "c": 0.30000000000000004}\n'


@pytest.mark.parametrize("torn", ["", '{"step": 5, "grpo/sco', "\0\0\0\0"])
def test_jsonl_after_a_resume_equals_an_unbroken_run(recipe: Recipe, tmp_path: Path, torn: str) -> None:
    play(JsonlWriter(JsonlOptions()), recipe, tmp_path / "unbroken", 1, 6)
    play(JsonlWriter(JsonlOptions()), recipe, tmp_path / "broken", 1, 4, end=False)
    file = tmp_path / "broken" / "metrics.jsonl"
    with file.open("a") as stream:
        stream.write(torn)
    play(JsonlWriter(JsonlOptions()), recipe, tmp_path / "broken", 3, 6)
    assert file.read_bytes() == (tmp_path / "unbroken" / "metrics.jsonl").read_bytes()


def test_jsonl_keeps_a_whole_last_row_without_its_newline(tmp_path: Path) -> None:
    (tmp_path / "m").write_text('{"step": 1}\n{"step": 2}')
    assert [row["step"] for row in read_metrics(tmp_path / "m")] == [1, 2]


@pytest.mark.parametrize("bad", ["nonsense", "[1]", "{}", '{"step": "one"}'])
def test_jsonl_names_a_bad_row(recipe: Recipe, tmp_path: Path, bad: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n')
    with pytest.raises(ObserverError, match=r"metrics\.jsonl:2"):
        play(JsonlWriter(JsonlOptions()), recipe, tmp_path, 3, 3)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3, "nothing was cut"


# ---------------------------------------------------------------------------------------------------------- TensorBoard


def test_tensorboard_scalars_and_texts(recipe: Recipe, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    play(TensorboardWriter(TensorboardOptions(samples_every=2)), recipe, tmp_path, 1, 4, end=False)
    time.sleep(1.1)  # event files are read in the order of the seconds in their names, as two sessions have them
    play(TensorboardWriter(TensorboardOptions(samples_every=2)), recipe, tmp_path, 3, 5)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scores = events.Scalars("grpo/score/mean")
    assert [event.step for event in scores] == [1, 2, 3, 4, 5], "steps done again are hidden, not shown twice"
    assert [event.value for event in scores] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    texts = events.Tensors("samples/0/text_summary")
    assert {event.step for event in texts} == {1, 2, 3, 4}
    assert "    What is *2+2*?" in texts[0].tensor_proto.string_val[0].decode()
    assert "    0.6252" in texts[0].tensor_proto.string_val[0].decode()


# -------------------------------------------------------------------------------------------------------------- console


def console_output(recipe: Recipe, tmp_path: Path, *, terminal: bool, samples: int = 1, first: int = 1) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100, color_system=None)
    play(ConsoleWriter(ConsoleOptions(samples=samples), console), recipe, tmp_path, first, STEPS)
    return stream.getvalue()


def test_plain_lines_without_a_terminal(recipe: Recipe, tmp_path: Path) -> None:
    lines = console_output(recipe, tmp_path, terminal=False).splitlines()
    assert "\x1b" not in "".join(lines)
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == STEPS
    assert " ".join(steps[0].split()) == "step 1/4 reward 0.100 length 14.2 2,500 tokens/s 2.00 s 0:00 left"
    assert "left" not in steps[-1]
    text = "\n".join(lines)
    assert "run finished" in text
    assert "0.250 -> 0.750 (+0.500" in text
    assert "1:02:05" in text
    assert "12,346" in text
    assert "score 0.125 -> 0.5 (prompts: 8)" in text
    assert "runs/demo/export" in text
    assert "[bold]4[/bold]" in text, "a sample is text, never markup"
    assert "score: '0.6252'" in text


def test_a_terminal_shows_a_bar_keeps_lines_and_ends_with_a_panel(recipe: Recipe, tmp_path: Path) -> None:
    text = console_output(recipe, tmp_path, terminal=True, first=2)
    assert "resuming at step 2" in text
    assert "training" in text
    assert "4/4" in text
    assert all(text.count(f"step {step}/4  reward") == 1 for step in (2, 3, 4))
    assert "run finished" in text
    assert "[bold]4[/bold]" in text


def test_trouble_is_on_the_line(recipe: Recipe, tmp_path: Path) -> None:
    stream = io.StringIO()
    writer = ConsoleWriter(ConsoleOptions(), Console(file=stream, width=100))
    writer.mmrl_run_start(recipe=recipe, run_dir=str(tmp_path), first_step=1)
    trouble = {"rewards/failed_samples": 3.0, "actor/skipped_updates": 1.0, "rewards/dropped_groups": 0.0}
    writer.mmrl_step_end(step=1, metrics={**metrics(1), **trouble}, samples=[])
    writer.mmrl_run_end(summary={"outcome": "failed", "steps": 1, "eval": None, "checkpoint": None})
    assert "3 failed samples  1 skipped updates" in stream.getvalue()
    assert "dropped groups" not in stream.getvalue()
    assert "run failed" in stream.getvalue()
    assert "None" not in stream.getvalue()


def test_a_run_that_never_started_ends_quietly() -> None:
    JsonlWriter(JsonlOptions()).mmrl_run_end(summary={"outcome": "failed"})
    TensorboardWriter(TensorboardOptions()).mmrl_run_end(summary={"outcome": "failed"})
    WandbWriter(WandbOptions()).mmrl_run_end(summary={"outcome": "failed"})
    ConsoleWriter(ConsoleOptions(), Console(file=io.StringIO())).mmrl_run_end(summary={"outcome": "failed"})


def test_durations() -> None:
    assert [duration(s) for s in (0, 59.4, 61, 3600, 90061)] == ["0:00", "0:59", "1:01", "1:00:00", "25:01:01"]


# ---------------------------------------------------------------------------------------------------------------- wandb


class FakeRun:
    """What the writer uses of a wandb run."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self.id = arguments["id"] or "abc123"
        self.logged: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.exit_code: int | None = None

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        assert name in ("step", "*")

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


def test_wandb_missing(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ObserverError, match=r"pip install 'mmrl-core\[wandb\]'"):
        play(WandbWriter(WandbOptions()), recipe, tmp_path, 1, 1)


def test_wandb_run_goes_on_after_a_resume(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[FakeRun] = []

    def init(**arguments: Any) -> FakeRun:
        runs.append(FakeRun(arguments))
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    play(WandbWriter(WandbOptions(mode="offline")), recipe, tmp_path, 1, 2)
    play(WandbWriter(WandbOptions()), recipe, tmp_path, 2, 3)
    first, second = runs
    assert first.arguments["mode"] == "offline"
    assert second.arguments["mode"] is None, "WANDB_MODE decides"
    assert first.arguments["resume"] is None
    assert (second.arguments["id"], second.arguments["resume"]) == ("abc123", "allow")
    assert [row["step"] for row in second.logged] == [2, 3]
    assert first.arguments["config"]["algorithm"]["steps"] == STEPS
    assert (first.exit_code, first.summary["last_reward"]) == (0, 0.75)


def test_wandb_refusing_is_explained(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> FakeRun:
        raise RuntimeError("api_key not configured")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with pytest.raises(ObserverError, match=r"api_key not configured.*mode: offline"):
        play(WandbWriter(WandbOptions()), recipe, tmp_path, 1, 1)


# -------------------------------------------------------------------------------------------------------------- picture


@pytest.mark.parametrize("count", [1, 12, 200])
def test_picture(tmp_path: Path, count: int) -> None:
    rows = [{"step": s, **metrics(s), "grpo/score/min": None, "eval/score/mean": 0.5} for s in range(1, count + 1)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw_progress(tmp_path / "m.jsonl", tmp_path / "p.png")
    content = (tmp_path / "p.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 10_000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.jsonl", "p.png"]


def test_picture_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ObserverError, match="cannot be read"):
        draw_progress(tmp_path / "m.jsonl", tmp_path / "p.png")
    (tmp_path / "m.jsonl").write_text("")
    with pytest.raises(ObserverError, match="no step yet"):
        draw_progress(tmp_path / "m.jsonl", tmp_path / "p.png")


def test_moving_average() -> None:
    found = moving_average([1.0, 3.0, math.nan, 8.0], 2)
    assert found == [1.0, 2.0, 3.0, 8.0]


def test_no_torch_where_none_is_needed() -> None:
    modules = ("names", "options", "jsonl", "console", "picture", "timers", "throughput", "probes")
    code = ";".join(f"import mmrl_core.metrics.{name}" for name in modules)
    code += (
        ";import mmrl_core.checkpoint.store, sys; assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
