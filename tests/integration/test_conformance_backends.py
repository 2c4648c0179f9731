"""The conformance kit on the built-in training backends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from mmrl_core.testing.backends import BackendConformance


class TestFsdp2(BackendConformance):
    component = "fsdp2"
    equivalent_options: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"micro_batch_groups": 2},
        {"micro_batch_groups": 3},
        {"micro_batch_samples": 2},
        {"activation_checkpointing": True},
    )


class TestFsdp2UntiedQwen2(BackendConformance):
    component = "fsdp2"
    options: ClassVar[Mapping[str, Any]] = {"micro_batch_groups": 2, "reshard_after_forward": False}
    architecture = "qwen2"
    tie_word_embeddings = False
    equivalent_options: ClassVar[Sequence[Mapping[str, Any]]] = ({"micro_batch_groups": 1},)
