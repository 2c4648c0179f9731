"""The conformance kit on the built-in rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from mmrl_core.contracts import Sample
from mmrl_core.testing.rewards import RewardConformance, text_sample


class TestNumeric(RewardConformance):
    component = "numeric"
    expected = (1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0)


class TestNumericWithFormat(RewardConformance):
    component = "numeric"
    options: ClassVar[Mapping[str, Any]] = {"correct_weight": 0.5, "format_weight": 0.5, "tolerance": 1.0}
    samples: ClassVar[Sequence[Sample]] = (text_sample("42."), text_sample("43"), text_sample("it is 42"))
    expected = (1.0, 1.0, 0.5)


class TestExact(RewardConformance):
    component = "exact"
    expected = (1.0, *(0.0,) * 9)


class TestFormat(RewardConformance):
    component = "format"
    expected = (*(0.0,) * 5, 1.0, *(0.0,) * 4)


class TestLength(RewardConformance):
    component = "length"
    options: ClassVar[Mapping[str, Any]] = {"maximum": 4, "ramp": 2}
    samples: ClassVar[Sequence[Sample]] = tuple(text_sample("word " * n, sample_id=n) for n in range(8))
    expected = (1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.0, 0.0)


class TestMath(RewardConformance):
    component = "math"
    expected = (*(0.0,) * 6, 1.0, *(0.0,) * 3)


class TestReasoningGym(RewardConformance):
    component = "reasoning_gym"
    options: ClassVar[Mapping[str, Any]] = {"dataset": "chain_sum"}
