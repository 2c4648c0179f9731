"""`profile` in a recipe: a trace of the steps that it names, with PyTorch's operators and the loop's phases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mmrl_core.cli import main as cli
from mmrl_core.metrics.jsonl import read_metrics
from mmrl_core.testing.tiny import tiny_language_model, tiny_recipe, write_recipe_file


def events(trace: Path) -> list[dict[str, Any]]:
    """What a Chrome trace holds."""
    found: list[dict[str, Any]] = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    return found


def test_steps_are_recorded_and_compute_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 2 of two, from the command line: the phases of the metrics, around the operators of the network."""
    monkeypatch.chdir(tmp_path)
    recipe = tiny_recipe(tiny_language_model(tmp_path / "model"), "plain", checkpoint={"export": True})
    write_recipe_file(tmp_path / "recipe.yaml", recipe)
    assert cli.main(["train", "recipe.yaml"]) == 0
    assert not (tmp_path / "plain" / "profile").exists()
    assert cli.main(["train", "recipe.yaml", "run_dir=profiled", "profile.steps=[2]"]) == 0
    (trace,) = (tmp_path / "profiled" / "profile").iterdir()
    assert trace.name == "step_00000002_rank0.json"
    bars = {event["name"]: event for event in events(trace) if event.get("ph") == "X"}
    timed = {name for row in read_metrics(tmp_path / "profiled" / "metrics.jsonl") for name in row if row[name]}
    phases = {"timing/all", "timing/rollout", "timing/adv", "timing/update"}
    assert phases <= bars.keys() & timed
    products = [event for event in events(trace) if event.get("name") == "aten::mm"]
    update = bars["timing/update"]
    inside = [e for e in products if 0 <= e["ts"] - update["ts"] <= update["dur"]]
    assert len(inside) > 10
    (left,), (right,) = ((tmp_path / run / "export").glob("*.safetensors") for run in ("plain", "profiled"))
    expected = load_file(left)
    assert all(tensor.equal(expected[name]) for name, tensor in load_file(right).items())


def test_ranks_are_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two ranks only the second, and only the step that is named."""
    monkeypatch.chdir(tmp_path)
    recipe = tiny_recipe(
        tiny_language_model(tmp_path / "model"),
        "run",
        launcher={"name": "local", "processes": 2},
        profile={"steps": [1, 7], "ranks": [1]},
    )
    write_recipe_file(tmp_path / "recipe.yaml", recipe)
    assert cli.main(["train", "recipe.yaml", "algorithm.steps=1"]) == 0
    assert [path.name for path in (tmp_path / "run" / "profile").iterdir()] == ["step_00000001_rank1.json"]


def test_no_step_is_no_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps begin at 1, and an empty list is a mistake."""
    recipe = tiny_recipe("model", "run")
    for steps, said in (([0], "profile.steps.0"), ([], "profile.steps")):
        path = write_recipe_file(tmp_path / "recipe.yaml", {**recipe, "profile": {"steps": steps}})
        assert cli.main(["recipe", "check", str(path)]) != 0
        assert said in capsys.readouterr().err
