"""Real measurements: the matrix of this machine, two ranks, and a gate that fires on what was planted."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mmrl_core.perf import machine
from mmrl_core.perf.jobs import PHASES

PLANTED = Path(__file__).parents[2] / "perf" / "planted"


def perf(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MMRL_PLUGINS")}
    return subprocess.run(
        [sys.executable, "-m", "mmrl_core.cli.main", "perf", *arguments],
        cwd=folder,
        env={**clean, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )


def measured(path: Path) -> dict[str, Any]:
    result = json.loads(path.read_text())
    assert result["commit"] == machine.commit()
    return {m["name"]: m for m in result["measured"]}


def test_run_measures_what_runs_and_says_why_the_rest_does_not(tmp_path: Path) -> None:
    choice = ["--only=cpu+fsdp2+flow+*", "--device=cpu", "--rounds=1", "--steps=2"]
    done = perf("run", *choice, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not measured: cpu+fsdp2+flow+text: rollout: flow denoises" in done.stdout
    assert re.search(r"\[2/2\] cpu\+fsdp2\+flow\+image, process 1 of 1, about \d+ s left", done.stderr)
    found = measured(tmp_path / "runs" / "perf" / "perf.json")
    assert set(found) == {"cpu+fsdp2+flow+image"}
    (part,) = found["cpu+fsdp2+flow+image"]["rounds"]
    assert len(part["steps"]) == 2
    for step in part["steps"]:
        assert set(PHASES) <= set(step), "every phase happens"
        assert sum(step[p] for p in PHASES if p != "all") <= step["all"]
        assert step["perf/samples_per_second"] == pytest.approx(32 / step["all"])
    for (rank,) in part["memory"]:
        assert rank["all"] == max(rank.values()) > 1e8
    page = perf("report", "runs/perf/perf.json", folder=tmp_path)
    assert page.returncode == 0, page.stderr
    assert "cpu+fsdp2+flow+image" in (tmp_path / "runs" / "perf" / "report.html").read_text()


def test_text_on_two_ranks(tmp_path: Path) -> None:
    choice = ["--only=cpu+fsdp2+hf+text", "--device=cpu", "--rounds=1", "--steps=1", "--tokens=5"]
    done = perf("run", "launcher.processes=2", *choice, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    one = measured(tmp_path / "runs" / "perf" / "perf.json")["cpu+fsdp2+hf+text"]
    assert one["ranks"] == 2
    assert one["work"]["overrides"] == ["launcher.processes=2"]
    assert [len(step) for step in one["rounds"][0]["memory"]] == [2, 2]
    assert len(one["summary"]["bytes"]["update"]) == 2, "each rank has its memory"
    assert one["work"]["sampling"]["max_new_tokens"] == 5
    step = one["rounds"][0]["steps"][0]
    assert step["update_tps"] / step["e2e_tps"] == pytest.approx(step["all"] / step["update"], rel=1e-6)
    assert one["forward_flops"] > 0, "of both ranks"
    assert one["summary"]["mfu"] is None, "nobody knows the peak of a CPU"


@pytest.mark.skipif(machine.commit() == machine.NO_CHECKOUT, reason="the gate compares commits of a git checkout")
def test_the_gate_fires_on_what_is_planted_in_the_working_tree(tmp_path: Path) -> None:
    """Far above the limits, for the machine may be busy; `python perf/prove_gate.py` plants what just must be found."""
    done = perf(
        "gate",
        "--base=HEAD",
        "--only=cpu+fsdp2+hf+text",
        "--device=cpu",
        "--pairs=16",
        folder=tmp_path,
        PYTHONPATH=str(PLANTED),
        PLANTED_IN=str(machine.REPOSITORY),
        PLANTED_TIME="update=1.8",
        PLANTED_MEMORY="old_log_p=1.05",
    )
    assert done.returncode == 1, done.stdout + done.stderr
    fired = re.findall(r"^FIRED: cpu\+fsdp2\+hf\+text: (\S+) .* times the (\w+)$", done.stdout, re.MULTILINE)
    assert {("update", "time"), ("old_log_p", "memory")} <= set(fired), done.stdout
    assert not {("rollout", "time"), ("reference_model", "time")} & set(fired), done.stdout
    # within the other phase memory is used for a moment; the whole step has no higher peak than the update's
    assert not {("rollout", "memory"), ("update", "memory"), ("reference_model", "memory")} & set(fired), done.stdout
    assert (
        str(tmp_path)
        not in subprocess.run(
            ["git", "-C", str(machine.REPOSITORY), "worktree", "list"], capture_output=True, text=True, check=True
        ).stdout
    )
