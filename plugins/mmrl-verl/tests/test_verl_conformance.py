"""The conformance kit for training backends on `verl-fsdp2`, with real processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from mmrl_core.testing.backends import BackendConformance


class TestVerlFsdp2(BackendConformance):
    """One process, and two ranks. A model that is not tied verl loads on its first rank only and sends to the others,
    adapters included."""

    component = "verl-fsdp2"
    architecture = "qwen2"
    tie_word_embeddings = False
    options: ClassVar[Mapping[str, Any]] = {"micro_batch_samples": 4}
    equivalent_options: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"micro_batch_samples": 1},
        {"micro_batch_samples": 64},
        {"remove_padding": True},
        {"remove_padding": True, "entropy_chunk_tokens": 3},
        {"activation_checkpointing": True},
        {"reshard_after_forward": False},
        {"defer_gradient_sync": False},
    )
    equivalent_policy_options: ClassVar[Sequence[Mapping[str, Any]]] = ({"prefix_sharing": "off"},)
