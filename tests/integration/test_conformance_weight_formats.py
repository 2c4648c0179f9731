"""The conformance kit on the built-in weight formats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from mmrl_core.testing.weight_formats import WeightFormatConformance


class TestHuggingFace(WeightFormatConformance):
    component = "hf"
    options: ClassVar[Mapping[str, Any]] = {"shard_gb": 1e-4}
    needs_config = False


class TestDcp(WeightFormatConformance):
    component = "dcp"
    needs_config = False
