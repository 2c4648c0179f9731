"""What mmrl relies on in any rollout engine, checked by its conformance kit, in an environment that has vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from mmrl_core.testing.engines import RolloutEngineConformance


class TestVllm(RolloutEngineConformance):
    component = "vllm"
    options: ClassVar[Mapping[str, Any]] = {"kv_cache_mb": 64, "max_num_seqs": 64}
    head_dim = 32
