"""Rows of `mmrl doctor` on Ascend machines, whole and broken, and the environment that a recipe wants."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ascend_machines import TOOLKIT, Site
from mmrl_npu import diagnoses, environment
from mmrl_npu.machine import Machine

from mmrl_core.plugins import import_string
from mmrl_core.recipe import Recipe


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_every_row_of_a_healthy_machine_is_well(site: Site) -> None:
    rows = diagnoses.declared(site.machine)
    assert [row.name for row in rows] == list(diagnoses.TOPICS)
    for row in rows:
        answer = import_string(row.probe, row.name)(site.machine)
        assert answer.available, f"{row.name}: {answer}"
        assert answer.reason, row.name


def test_a_machine_without_ascend_has_no_rows(tmp_path: Path) -> None:
    assert diagnoses.declared(Machine(root=tmp_path, environment={}, distributions={})) == []


def unsourced(site: Site) -> None:
    del site.environment["ASCEND_HOME_PATH"]


def unreadable(site: Site) -> None:
    (site.root / "dev/davinci1").chmod(0)


BROKEN: list[tuple[str, Callable[[Site], Any], str, str]] = [
    ("cann", unsourced, "environment is not set", f"source {TOOLKIT}/set_env.sh"),
    ("cann", lambda s: s.environment.update(ASCEND_HOME_PATH="/gone"), "does not exist", "source"),
    ("nnal", lambda s: s.remove("/usr/local/Ascend/nnal/atb/latest/version.info"), "not installed", "Ascend-cann-nnal"),
    ("nnal", lambda s: s.environment.pop("ATB_HOME_PATH"), "not set", "source /usr/local/Ascend/nnal/atb/set_env.sh"),
    (
        "nnal",
        lambda s: s.write("/usr/local/Ascend/nnal/atb/latest/version.info", "Ascend-cann-atb : 8.2.RC1"),
        "NNAL 8.2.RC1 beside CANN 8.5.0",
        "Ascend-cann-nnal 8.5.0",
    ),
    ("ascend-driver", lambda s: s.remove("/usr/local/Ascend/driver/version.info"), "no driver files", "docker run -v"),
    ("ascend-driver", lambda s: s.remove("/usr/local/bin/npu-smi"), "no npu-smi", "/usr/local/dcmi"),
    ("npus", lambda s: s.remove("/dev/devmm_svm"), "/dev/devmm_svm", "--device=/dev/devmm_svm"),
    ("npus", lambda s: s.environment.update(ASCEND_RT_VISIBLE_DEVICES="0,a"), "'a' is not a number", "=0,1,10"),
    ("torch-npu", unsourced, "`import torch` fails", f"source {TOOLKIT}/set_env.sh"),
    ("torch-npu", lambda s: s.packages.update(torch="2.13.0"), "made for torch 2.7.1", "pip install torch==2.7.1"),
    ("hccl", lambda s: s.environment.update(LD_LIBRARY_PATH=""), "not on LD_LIBRARY_PATH", "source"),
    ("hccl", lambda s: s.remove(f"{TOOLKIT}/lib64/libhccl.so"), "no libhccl.so in", "install the CANN toolkit again"),
    ("hccl-variables", lambda s: s.environment.update(HCCL_CONNECT_TIMEOUT="60"), "from 120 to 7200", "=1200"),
    ("hccl-variables", lambda s: s.environment.update(HCCL_CONNECT_TIMEOUT="20m"), "'20m'", "=1200"),
    ("hccl-variables", lambda s: s.environment.update(HCCL_DETERMINISTIC="1"), "none of false, true", "=true"),
    ("hccl-variables", lambda s: s.environment.update(HCCL_IF_IP="127.0.0.1"), "loopback", "unset HCCL_IF_IP"),
    (
        "npu-allocator",
        lambda s: s.environment.update(PYTORCH_NPU_ALLOC_CONF="max_split_size_mb:64, expandable_segments:True"),
        "excludes max_split_size_mb",
        "export PYTORCH_NPU_ALLOC_CONF=expandable_segments:True",
    ),
    (
        "jemalloc",
        lambda s: s.write("/proc/self/maps", ""),
        "not preloaded",
        'export LD_PRELOAD="${LD_PRELOAD:+$LD_PRELOAD:}/usr/lib/aarch64-linux-gnu/libjemalloc.so.2"',
    ),
    ("ip-command", lambda s: s.remove("/usr/bin/ip"), "no command ip", "apt-get install -y iproute2"),
]


@pytest.mark.parametrize(
    ("topic", "breaking", "reason", "cure"),
    BROKEN,
    ids=lambda value: value[:30] if isinstance(value, str) else "broken",
)
def test_what_is_wrong_is_said_with_its_cure(
    site: Site, topic: str, breaking: Callable[[Site], Any], reason: str, cure: str
) -> None:
    breaking(site)
    answer = import_string(f"mmrl_npu.diagnoses:{diagnoses.TOPICS[topic]}", topic)(site.machine)
    assert not answer.available
    assert reason in answer.reason
    assert cure in answer.cure


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open everything")
def test_a_node_that_may_not_be_opened(site: Site) -> None:
    unreadable(site)
    assert "may not be opened" in diagnoses.npus(site.machine).reason


def test_an_interface_that_is_not_there(site: Site) -> None:
    for name in ("eth0", "lo"):
        site.write(f"/sys/class/net/{name}/mtu", "")
    site.environment["HCCL_SOCKET_IFNAME"] = "=enp1"
    answer = diagnoses.hccl_variables(site.machine)
    assert "(eth0, lo)" in answer.reason
    site.environment["HCCL_SOCKET_IFNAME"] = "enp"  # the beginning of a name, on some other host perhaps
    assert diagnoses.hccl_variables(site.machine).available


def test_jemalloc_that_was_named_and_not_loaded(site: Site) -> None:
    site.write("/proc/self/maps", "")
    site.remove("/usr/lib/aarch64-linux-gnu/libjemalloc.so.2")
    site.environment["LD_PRELOAD"] = "/opt/libjemalloc.so.2"
    answer = diagnoses.jemalloc_preloaded(site.machine)
    assert "LD_PRELOAD names /opt/libjemalloc.so.2, but it was not loaded" in answer.reason
    assert answer.cure == "apt-get install -y libjemalloc2"
    site.write("/usr/bin/yum", "#!/bin/sh\n").chmod(0o755)
    assert diagnoses.jemalloc_preloaded(site.machine).cure == "yum install -y jemalloc"


# --------------------------------------------------------------------------------------------------------- environment


def wanted(site: Site, ranks: int = 1, nodes: int = 1, **sections: Any) -> dict[str, str]:
    plain: dict[str, Any] = {
        "model": {"path": "m"},
        "sampling": {},
        "data": "arithmetic",
        "rewards": ["numeric"],
        "algorithm": {"steps": 1, "prompts_per_step": 1, "samples_per_prompt": 2},
    }
    recipe = Recipe.model_validate({**plain, **sections})
    return {v.name: v.value for v in environment.of(recipe, site.machine, ranks=ranks, nodes=nodes)}


def test_one_rank(site: Site) -> None:
    assert wanted(site) == {
        "TASK_QUEUE_ENABLE": "2",
        "CPU_AFFINITY_CONF": "1",
        "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
    }


@pytest.mark.parametrize(("ranks", "nodes"), [(8, 1), (1, 2)])
def test_several_ranks_wait_for_each_other(site: Site, ranks: int, nodes: int) -> None:
    assert 120 <= int(wanted(site, ranks, nodes)["HCCL_CONNECT_TIMEOUT"]) <= 7200


def test_what_components_want(site: Site) -> None:
    assert wanted(site, backend="megatron")["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in wanted(site)
    assert "PYTORCH_NPU_ALLOC_CONF" not in wanted(site, rollout="mmrl-vllm:vllm")
    library = "/usr/lib/aarch64-linux-gnu/libjemalloc.so.2"
    assert wanted(site, launcher="ray")["LD_PRELOAD"] == library
    assert "LD_PRELOAD" not in wanted(site)
    site.remove(library)
    assert "LD_PRELOAD" not in wanted(site, launcher="ray"), "doctor says how to install it"


def test_determinism(site: Site) -> None:
    assert set(environment.DETERMINISTIC) <= set(wanted(site, deterministic=True))
    assert not set(environment.DETERMINISTIC) & set(wanted(site))


def test_doctor_accepts_what_is_recommended(site: Site) -> None:
    site.environment.update(wanted(site, 8, 2, deterministic=True))
    for topic in ("hccl-variables", "npu-allocator"):
        assert import_string(f"mmrl_npu.diagnoses:{diagnoses.TOPICS[topic]}", topic)(site.machine).available
