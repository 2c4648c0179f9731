"""Training on a Ray cluster is training: the same numbers, whatever dies meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
from kill_moments import alive, model_in, numbers, ranks_of, recipe, run_with_kills, start, weights
from ray_nodes import RayNode, ours, wait_for_nodes

from mmrl_core.testing.launchers import LauncherConformance

STEPS = 12
LIMIT_S = 540


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    model_in(folder)
    return folder


@pytest.fixture(scope="module")
def calm(place: Path) -> Path:
    """The run folder of the same training with the launcher local."""
    run = place / "calm"
    done = start(recipe(place / "model", run, {"name": "local", "processes": 2}, STEPS))
    out, err = done.communicate(timeout=LIMIT_S)
    assert done.returncode == 0, f"{out}\n{err}"
    assert all(row["grad_norm"] > 0 for row in numbers(run)), "else equal weights would say nothing"
    return run


def test_a_cluster_of_this_machine_equals_the_local_launcher(place: Path, calm: Path) -> None:
    """As a user runs it, with nothing but the launcher's name: output, logs, metrics, weights; nothing stays."""
    run = place / "here"
    file = recipe(place / "model", run, {"name": "ray", "processes": 2}, STEPS)
    before = {p.pid for p in ours()}
    done = subprocess.run(
        [sys.executable, "-m", "mmrl_core.cli.main", "train", str(file), "writers=[jsonl, console]"],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert weights(run) == weights(calm)
    assert numbers(run) == numbers(calm)
    assert f"step {STEPS}/{STEPS}" in done.stdout
    assert "mmrl: starting from step 1" in done.stdout
    assert (run / "logs" / "rank1.log").is_file()
    assert not [p.name for p in run.iterdir() if p.name.startswith(".")], "the token is removed"
    _, left = psutil.wait_procs([p for p in ours() if p.pid not in before], timeout=15)
    assert not left


def test_kills_at_random_moments_change_nothing(place: Path, calm: Path, cluster: str) -> None:
    """Two nodes, a rank on each; three of them killed with -9. Nothing in a rank imports ray."""
    run = place / "kills"
    seed = int(time.time())
    options = {"name": "ray", "address": cluster, "processes": 2, "strategy": "STRICT_SPREAD", "max_restarts": 3}
    said = run_with_kills(recipe(place / "model", run, options, STEPS), run, kills=3, steps=STEPS, seed=seed)
    for number in (1, 2, 3):
        assert f"restart {number} of 3: all ranks start again from the last checkpoint" in said, (seed, said)
        assert f"restart {number} of 3" in (run / "run.log").read_text(), "the run's log says it too"
    assert said.count("was killed by signal 9 (SIGKILL)") == 3, (seed, said)
    assert "resuming after step" in (run / "run.log").read_text()
    assert weights(run) == weights(calm), seed
    assert numbers(run) == numbers(calm), seed
    ranks = [json.loads((run / f"guard{rank}.json").read_text()) for rank in (0, 1)]
    assert [(r["RANK"], r["LOCAL_RANK"], r["LOCAL_WORLD_SIZE"]) for r in ranks] == [("0", "0", "1"), ("1", "0", "1")]
    assert ranks[0]["MASTER_ADDR"] == ranks[1]["MASTER_ADDR"] == cluster.rpartition(":")[0]
    assert not ranks[0]["MASTER_ADDR"].startswith("127."), "an address that both nodes can reach"
    assert [r["attempts"] for r in ranks] == [0, 0]
    assert [r["nice"] for r in ranks] == [os.nice(0)] * 2
    assert not ranks_of(run)


def test_a_lost_node_is_replaced_by_what_is_left(place: Path, calm: Path, head: RayNode, cluster: str) -> None:
    one, two = '{"place": 1}', '{"place": 2}'
    with (
        RayNode(cpus=2, join=head.address, resources=one) as doomed,
        RayNode(cpus=2, join=head.address, resources=two),
    ):
        wait_for_nodes(head.address, 4)
        run = place / "node"
        options = {"name": "ray", "address": cluster, "processes": 2, "resource": "place", "strategy": "STRICT_SPREAD"}
        file = recipe(place / "model", run, {**options, "strategy": "SPREAD"}, STEPS)
        process = start(file)
        deadline = time.monotonic() + LIMIT_S
        while len(numbers(run)) < 3:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert {p.pid for p in alive(run, set())} & {p.pid for p in doomed.processes()}
        doomed.kill()
        out, err = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0, f"{out}\n{err}"
        assert "was lost with its node" in err
        assert "restart 1 of 3" in err
        assert weights(run) == weights(calm)
        assert numbers(run) == numbers(calm)


class TestRay(LauncherConformance):
    component = "ray"
    options: ClassVar[Mapping[str, Any]] = {"processes": 2}

    @pytest.fixture(autouse=True)
    def _on_the_cluster(self, cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RAY_ADDRESS", cluster)
        monkeypatch.delenv("RAY_AUTH_MODE")  # the token is found all the same
