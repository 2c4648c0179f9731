"""The gate against baselines, its sentences and its exit statuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmrl_core.cli import main as cli
from mmrl_core.cli import perf as command
from mmrl_core.errors import PluginError
from mmrl_core.perf import gate
from mmrl_core.perf.decide import Estimate
from mmrl_core.perf.gate import Verdict, gate_baselines, load_baselines, verdict_table
from mmrl_core.perf.matrix import Combination, Matrix
from mmrl_core.perf.measure import Effort
from mmrl_core.perf.results import NotMeasured, Result
from mmrl_core.perf.side_by_side import Finding
from mmrl_core.perf.trees import Tree

COMBINATION = Combination(device="cpu", backend="fsdp2", rollout="hf", modality="text", components=())
MATRIX = Matrix(size="tiny", tokens=16, overrides=(), combinations=(COMBINATION,), unavailable=())
EFFORT = Effort(steps=3, warmup=1, rounds=2)


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`measure(first, again)` lets the gate measure these results, one after the other; returns what it was asked."""

    def given(*results: Result) -> list[Matrix]:
        asked: list[Matrix] = []

        def fake(matrix: Matrix, *_: Any) -> Result:
            asked.append(matrix)
            return results[len(asked) - 1]

        monkeypatch.setattr(gate, "measure", fake)
        return asked

    return given


def verdict(baselines: list[Result]) -> Verdict:
    head = Tree(name="head", folder=Path("."))
    return gate_baselines(MATRIX, head, EFFORT, baselines, lambda line: None)


def fired(found: Verdict) -> set[tuple[str, str]]:
    return {(f.kind, f.phase) for f in found.fired}


def test_slower_than_the_baseline_twice_fires(made: Any, measure: Any) -> None:
    slow = made.result(made.measured(scale=1.25))
    asked = measure(slow, slow)
    found = verdict([made.result(made.measured())])
    assert fired(found) == {("time", p) for p in ("rollout", "update", "all")}
    assert [m.combinations for m in asked] == [(COMBINATION,)] * 2
    assert "FIRED: cpu+fsdp2+hf+text: update takes 1.25 times the time" in verdict_table(found).splitlines()


def test_slower_once_is_noise(made: Any, measure: Any) -> None:
    measure(made.result(made.measured(scale=1.25)), made.result(made.measured()))
    found = verdict([made.result(made.measured())])
    assert fired(found) == set()
    assert verdict_table(found).splitlines()[-1] == "silent: 5 phases are not worse than in baselines of abc"


def test_within_the_band_is_silent(made: Any, measure: Any) -> None:
    """Processes of the baseline differed by 1.1: up to 1.09 x 1.1 proves nothing."""
    asked = measure(made.result(made.measured(scale=1.19)))
    found = verdict([made.result(made.measured())])
    assert fired(found) == set()
    assert len(asked) == 1
    assert {f.state for f in found.findings if f.kind == "time"} == {"unclear"}
    assert "unclear" in verdict_table(found)


def test_memory_is_tight(made: Any, measure: Any) -> None:
    large = made.result(made.measured(peak=1.03))
    measure(large, large)
    assert fired(verdict([made.result(made.measured())])) == {("memory", "update"), ("memory", "all")}
    measure(made.result(made.measured(peak=1.015)))
    assert fired(verdict([made.result(made.measured())])) == set()


def test_the_newest_baseline_of_this_machine_and_work_counts(made: Any, measure: Any) -> None:
    measure(made.result(made.measured()))
    baselines = [
        made.result(made.measured(scale=1.0), created="2026-02-01"),
        made.result(made.measured(scale=0.5), created="2026-01-01"),
        made.result(made.measured(scale=0.5), created="2026-03-01", machine="m2"),
        made.result(made.measured(scale=0.5, work={"prompts": 8}), created="2026-03-01"),
    ]
    assert fired(verdict(baselines)) == set()
    measure(made.result(made.measured()))
    found = verdict(baselines[2:])
    assert found.findings == []
    assert NotMeasured(
        name="cpu+fsdp2+hf+text", reason="there is no baseline of this work on this machine"
    ) in found.skipped  # fmt: skip


def test_baselines_of_a_folder(made: Any, tmp_path: Path) -> None:
    assert load_baselines(tmp_path / "missing") == []
    made.result(made.measured()).save(tmp_path / "a.json")
    assert [b.commit for b in load_baselines(tmp_path)] == ["abc"]


def finding(state: Any) -> Finding:
    return Finding(
        combination="cpu+fsdp2+hf+text",
        kind="memory",
        phase="update",
        base=3e8,
        head=3.1e8,
        estimate=Estimate(ratio=1.033, low=1.03, high=1.04),
        state=state,
    )


@pytest.mark.parametrize(("states", "status"), [(["fine"], 0), (["fine", "fired"], 1), (["unclear"], 0), ([], 2)])
def test_exit_statuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], states: list[Any], status: int
) -> None:
    found = Verdict(against="abc", findings=[finding(s) for s in states], skipped=[])
    monkeypatch.setattr(command, "_gate", lambda arguments: found)
    assert cli.main(["perf", "gate"]) == status
    said = "FIRED: cpu+fsdp2+hf+text: update needs at its peak 1.03 times the memory"
    assert (said in capsys.readouterr().out) == (status == 1)


@pytest.mark.parametrize("error", [PluginError("broken"), RuntimeError("a bug")])
def test_trouble_does_not_look_like_a_finding(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(arguments: Any) -> Verdict:
        raise error

    monkeypatch.setattr(command, "_gate", fail)
    assert cli.main(["perf", "gate"]) == 2


def test_with_a_baseline_of_this_machine_no_commit_is_needed(
    monkeypatch: pytest.MonkeyPatch, made: Any, tmp_path: Path
) -> None:
    made.result(made.measured()).save(tmp_path / "a.json")
    modes = []
    here = ["m1"]
    monkeypatch.setattr(gate, "this_machine", lambda matrix, tree: here[-1])
    monkeypatch.setattr(gate, "gate_baselines", lambda *_: modes.append("baselines"))
    monkeypatch.setattr(gate, "gate_side_by_side", lambda *_: modes.append("turns"))
    monkeypatch.setattr("mmrl_core.perf.trees.commit_tree", _no_tree)
    for machine, base in (("m1", None), ("m2", None), ("m1", "HEAD")):
        here.append(machine)
        arguments = SimpleNamespace(baselines=tmp_path, base=base, pairs=None, **MATRIX_ARGUMENTS)
        command._gate(arguments)  # type: ignore[arg-type]
    assert modes == ["baselines", "turns", "turns"]


MATRIX_ARGUMENTS: dict[str, Any] = {"device": "cpu", "size": "tiny", "tokens": 16, "overrides": [], "only": []}


class _no_tree:
    def __init__(self, *_: Any) -> None:
        pass

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: Any) -> None:
        return None
