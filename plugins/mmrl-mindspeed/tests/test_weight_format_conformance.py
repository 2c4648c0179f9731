"""The conformance kit on Megatron's and MindSpeed-MM's formats."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import wan_models

from mmrl_core.testing.weight_formats import WeightFormatConformance


class TestMcore(WeightFormatConformance):
    component = "mcore"
    options: ClassVar[Mapping[str, Any]] = {"tensor_parallel": 2, "pipeline_parallel": 2}


class TestMindSpeedMm(WeightFormatConformance):
    component = "mindspeed-mm"
    needs_config = False

    @classmethod
    def model(cls, folder: Path) -> Path:
        pytest.importorskip("diffusers")
        return wan_models.write_wan(folder / "model", "wan2.1-t2v")


class TestMindSpeedMmDcp(TestMindSpeedMm):
    options: ClassVar[Mapping[str, Any]] = {"storage": "dcp"}
