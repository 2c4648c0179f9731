"""What is decided before any rank runs: resources, variables, paths, what nodes must share. Without a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from mmrl_ray.cluster import Node
from mmrl_ray.environment import environments
from mmrl_ray.node_inspection import Wanted, describe, inspect, problems
from mmrl_ray.nodes import local_paths
from mmrl_ray.options import RayOptions
from mmrl_ray.placement import Place, bundle_of, capacity, resource_of
from mmrl_ray.rank_process import Host
from pydantic import ValidationError

from mmrl_core.errors import PreflightError
from mmrl_core.recipe import Recipe


def test_devices_have_rays_names() -> None:
    assert resource_of("cuda", None) == "GPU"
    assert resource_of("mmrl-npu:npu", None) == "NPU"
    assert resource_of("cpu", None) == "CPU"
    assert resource_of("abacus", "ABACUS") == "ABACUS"
    with pytest.raises(PreflightError, match=r"devices 'abacus' is not known.*launcher.resource=abacus"):
        resource_of("abacus", None)


def test_bundles() -> None:
    assert bundle_of("GPU", 4) == {"GPU": 1.0, "CPU": 4.0}
    assert bundle_of("NPU", 0) == {"NPU": 1.0}
    assert bundle_of("CPU", 0) == {"CPU": 1.0}, "a rank on a CPU needs one"


@pytest.mark.parametrize(
    ("strategy", "cpus", "room"),
    [("PACK", 1, 12), ("SPREAD", 4, 6), ("STRICT_PACK", 1, 8), ("STRICT_SPREAD", 1, 2), ("PACK", 100, 0)],
)
def test_capacity(strategy: str, cpus: int, room: int) -> None:
    nodes = [{"GPU": 8.0, "CPU": 8.0}, {"GPU": 4.0, "CPU": 64.0}, {"CPU": 64.0}]
    assert capacity(nodes, bundle_of("GPU", cpus), strategy) == room


def _places() -> list[Place]:
    nodes = [Node(id=name, address=f"10.0.0.{i}", resources={}, alive=True) for i, name in enumerate("ab", 1)]
    at = [(0, 0, 2), (0, 1, 2), (1, 0, 1)]
    return [
        Place(rank=r, node=nodes[n], local_rank=local, local_size=size, bundle=r)
        for r, (n, local, size) in enumerate(at)
    ]


def _hosts(interface: str | None = "eth0") -> list[Host]:
    devices = [("3",), ("1",), ("0",)]
    addresses = ("10.0.0.1", "10.0.0.1", "10.0.0.2")
    return [
        Host(address=a, devices=d, cores=8, niceness=0, interface=interface)
        for a, d in zip(addresses, devices, strict=True)
    ]


def _environments(own: Mapping[str, str], interface: str | None = "eth0", **options: Any) -> list[dict[str, str]]:
    return environments(
        _places(), _hosts(interface), 4711, RayOptions(**options), "GPU", own, Path("/runs/a/logs"), "10.0.0.1:6379"
    )


def test_ranks_get_the_variables_of_torch_distributed() -> None:
    made = _environments({"HOME": "/root", "HF_HUB_OFFLINE": "1", "MMRL_STORE": "x", "NCCL_DEBUG": "INFO"})
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [[e[name] for name in names] for e in made] == [
        ["0", "0", "3", "2", "10.0.0.1", "4711"],
        ["1", "1", "3", "2", "10.0.0.1", "4711"],
        ["2", "0", "3", "1", "10.0.0.1", "4711"],
    ]
    assert [e["CUDA_VISIBLE_DEVICES"] for e in made] == ["3,1", "3,1", "0"], "a node's devices, by local rank"
    assert [e.get("MMRL_RANK_LOG") for e in made] == [None, "/runs/a/logs/rank1.log", "/runs/a/logs/rank2.log"]
    assert [e["OMP_NUM_THREADS"] for e in made] == ["4", "4", "8"]
    assert [e["GLOO_SOCKET_IFNAME"] for e in made] == ["eth0"] * 3
    for e in made:
        assert e["HF_HUB_OFFLINE"] == "1"
        assert not {"HOME", "NCCL_DEBUG", "MMRL_STORE"} & set(e), "a node's own matter"


def test_what_a_recipe_says_comes_first() -> None:
    made = _environments(
        {"OMP_NUM_THREADS": "3", "HF_HOME": "/here"}, environment={"HF_HOME": "/there", "GLOO_SOCKET_IFNAME": "ib0"}
    )
    assert {(e["OMP_NUM_THREADS"], e["HF_HOME"], e["GLOO_SOCKET_IFNAME"]) for e in made} == {("3", "/there", "ib0")}
    made = _environments({"OMP_NUM_THREADS": "3"}, interface=None, threads_per_process=5)
    assert {e["OMP_NUM_THREADS"] for e in made} == {"5"}
    assert not any("GLOO_SOCKET_IFNAME" in e for e in made), "the node has chosen"


def test_breakpoints_are_rays_when_asked_for() -> None:
    assert not any("PYTHONBREAKPOINT" in e for e in _environments({"RAY_DEBUG": "1"}))
    for e in _environments({"RAY_DEBUG": "legacy"}):
        assert e["PYTHONBREAKPOINT"] == "mmrl_ray.breakpoints.set_trace"
        assert e["MMRL_RAY_ADDRESS"] == "10.0.0.1:6379"


def test_variables_of_the_launcher_cannot_be_taken() -> None:
    with pytest.raises(ValidationError, match="MASTER_ADDR: the launcher sets these"):
        RayOptions(environment={"MASTER_ADDR": "localhost"})


def _recipe(**fields: Any) -> Recipe:
    base = {
        "model": {"path": "some/model"},
        "data": {"name": "jsonl", "path": "prompts.jsonl"},
        "rewards": ["exact"],
        "algorithm": {"steps": 1, "prompts_per_step": 2, "samples_per_prompt": 2},
    }
    return Recipe.model_validate({**base, **fields})


def test_paths_are_found_in_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").touch()
    assert local_paths(_recipe(), tmp_path) == ["prompts.jsonl"], "a hub id is no path"
    (tmp_path / "some" / "model").mkdir(parents=True)
    assert local_paths(_recipe(), tmp_path) == ["some/model", "prompts.jsonl"]
    assert local_paths(_recipe(model={"path": "/not/here"}), tmp_path) == ["/not/here", "prompts.jsonl"]
    assert local_paths(_recipe(data={"name": "jsonl", "path": "/d/*.jsonl"}), tmp_path) == ["some/model"]


def test_a_node_that_is_like_this_one_has_no_problems(tmp_path: Path) -> None:
    wanted = _wanted(tmp_path)
    (tmp_path / "prompts.jsonl").touch()
    here = inspect(wanted)
    assert problems("10.0.0.2", inspect(wanted), here, wanted) == []
    assert here["versions"]["mmrl-core"]  # type: ignore[index]
    assert here["versions"]["torch"]  # type: ignore[index]


def _wanted(folder: Path) -> Wanted:
    (folder / "run").mkdir(exist_ok=True)
    (folder / "run" / "token").write_text("secret")
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text("{}")
    return Wanted(
        packages=("torch",),
        working_dir=str(folder),
        run_dir="run",
        token_file="run/token",
        paths=("model", "prompts.jsonl"),
    )


def test_every_difference_is_a_line_with_the_node(tmp_path: Path) -> None:
    wanted = _wanted(tmp_path)
    (tmp_path / "prompts.jsonl").write_text("{}\n")
    here = inspect(wanted)
    (tmp_path / "run" / "token").write_text("another")
    (tmp_path / "prompts.jsonl").unlink()
    (tmp_path / "model" / "config.json").write_text("{ }")
    there = inspect(wanted)
    there |= {"host": "worker", "python": "3.9.1", "versions": {**here["versions"], "torch": "1.0"}}  # type: ignore[dict-item]
    del there["versions"]["mmrl-ray"]  # type: ignore[attr-defined]
    lines = problems("10.0.0.2", there, here, wanted)
    assert all(line.startswith("node 10.0.0.2 (worker): ") for line in lines)
    text = "\n".join(lines)
    assert "Python 3.9.1 there" in text
    assert "torch 1.0 there" in text
    assert "mmrl-ray not installed there" in text
    assert "the run folder run is not the one that this process writes: it must be shared" in text
    assert "nothing at prompts.jsonl, which the recipe names" in text
    assert "model is a folder of 1 entries" in text
    assert len(lines) == 6


def test_a_node_without_the_working_directory(tmp_path: Path) -> None:
    wanted = _wanted(tmp_path)
    here = inspect(wanted)
    away = Wanted(**{**wanted.__dict__, "working_dir": str(tmp_path / "elsewhere")})
    (line,) = problems("n", inspect(away), here, wanted)
    assert f"no folder {tmp_path}, where mmrl was started (launcher.working_dir names another)" in line


def test_descriptions_tell_contents_apart(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    (tmp_path / "b" / "x").write_text("2")
    assert describe(str(tmp_path / "a")) == describe(str(tmp_path / "b"))
    (tmp_path / "b" / "x").write_text("22")
    assert describe(str(tmp_path / "a")) != describe(str(tmp_path / "b"))
    assert describe(str(tmp_path / "a" / "x")) == "a file of 1 bytes"
    assert describe(str(tmp_path / "c")) is None
