"""What a run on NPUs should find in its environment. Imports no torch.

The values are those of the start scripts of MindSpeed-RL, MindSpeed-MM and verl for Ascend, with their meaning checked
in the references of environment variables of CANN and of the Ascend Extension for PyTorch
(www.hiascend.com/document), and without what those scripts get wrong or set to a default. Variables that only a person
can choose, such as the network interface of HCCL_SOCKET_IFNAME, are not here.
"""

from __future__ import annotations

from mmrl_core import EnvironmentVariable
from mmrl_core.recipe import Recipe
from mmrl_npu import jemalloc
from mmrl_npu.machine import Machine, here

DETERMINISTIC = {"HCCL_DETERMINISTIC": "true", "LCCL_DETERMINISTIC": "1", "CLOSE_MATMUL_K_SHIFT": "1"}
"""What MindSpeed-RL sets for deterministic runs, its `use_deter_comp`: reductions of HCCL and LCCL, and matrix products
that do not shift their order of summation from core to core."""
CONNECT_S = 1200
"""Seconds; CANN takes 120 (its default) to 7200. Ranks that load large models reach their first collective minutes
apart."""


def recommend(recipe: Recipe, *, ranks: int, nodes: int) -> list[EnvironmentVariable]:
    """For `ranks` on each of `nodes` machines, on this machine."""
    return of(recipe, here(), ranks=ranks, nodes=nodes)


def of(recipe: Recipe, machine: Machine, *, ranks: int, nodes: int) -> list[EnvironmentVariable]:
    """The same on a given machine, whose files say where jemalloc is."""
    variables = [
        _variable("TASK_QUEUE_ENABLE", "2", "operators are handed to the NPU by a second thread, balanced (level 2)"),
        _variable("CPU_AFFINITY_CONF", "1", "each rank stays on the cores that belong to its NPU"),
    ]
    if _word(recipe.rollout.name) != "vllm":  # its sleep mode refuses growing segments
        reason = "the allocator's segments grow, which leaves less memory unused between tensors"
        variables.append(_variable("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True", reason))
    if ranks * nodes > 1:
        reason = "seconds that ranks wait for each other at the first collective; the same on every machine"
        variables.append(_variable("HCCL_CONNECT_TIMEOUT", str(CONNECT_S), reason))
    if _word(recipe.backend.name) == "megatron":
        reason = "Megatron overlaps communication with products only where one queue keeps their order"
        variables.append(_variable("CUDA_DEVICE_MAX_CONNECTIONS", "1", reason))
    if recipe.deterministic:
        reason = "deterministic: true: sums in the same order in every run, at a cost in speed"
        variables += [_variable(name, value, reason) for name, value in DETERMINISTIC.items()]
    library = jemalloc.find(machine) if _word(recipe.launcher.name) == "ray" else None
    if library is not None:
        reason = "Ray's workers give freed memory back"
        variables.append(EnvironmentVariable(name="LD_PRELOAD", value=library, reason=reason, extends=True))
    return variables


def _word(name: str) -> str:
    """Without the distribution."""
    return name.rpartition(":")[2]


def _variable(name: str, value: str, reason: str) -> EnvironmentVariable:
    return EnvironmentVariable(name=name, value=value, reason=reason)
