"""The conformance kit for training backends on `megatron`, with real processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from mmrl_core.testing.backends import BackendConformance


class TestMegatron(BackendConformance):
    """One process, and two replicas with the distributed optimizer."""

    component = "megatron"
    options: ClassVar[Mapping[str, Any]] = {}
    lora: ClassVar[bool] = False
    equivalent_options: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"micro_batch_groups": 3},
        {"micro_batch_samples": 2},
        {"activation_checkpointing": True},
        {"distributed_optimizer": False},
        {"attention": "megatron"},
    )
    equivalent_policy_options: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"prefix_sharing": "off"},
        {"logits_memory_mb": 1},
    )
