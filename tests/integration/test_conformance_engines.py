"""The conformance kit on the built-in rollout engines and policies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from mmrl_core.testing.engines import RolloutEngineConformance
from mmrl_core.testing.policies import PolicyConformance


class TestHfShared(RolloutEngineConformance):
    component = "hf"


class TestHfOwn(RolloutEngineConformance):
    component = "hf"
    options: ClassVar[Mapping[str, Any]] = {"weights": "own"}


class TestHfOwnUntiedInTurns(RolloutEngineConformance):
    component = "hf"
    options: ClassVar[Mapping[str, Any]] = {"weights": "own", "max_rows": 5}
    architecture = "qwen2"
    tie_word_embeddings = False


class TestCausalLmOnLlama(PolicyConformance):
    component = "causal_lm"


class TestCausalLmOnUntiedQwen2(PolicyConformance):
    component = "causal_lm"
    architecture = "qwen2"
    tie_word_embeddings = False
