"""The conformance kit on rewards and writers of images and videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from mmrl_core.contracts import Sample
from mmrl_core.metrics.reward_history import read_history
from mmrl_core.testing.rewards import IMAGES, VIDEOS, RewardConformance
from mmrl_core.testing.writers import STEPS, WriterConformance


class TestJpegCompressibility(RewardConformance):
    component = "jpeg_compressibility"
    samples: ClassVar[Sequence[Sample]] = (*IMAGES, *VIDEOS)


class TestBrightness(RewardConformance):
    component = "brightness"
    options: ClassVar[Mapping[str, Any]] = {"video": "mean", "every": 2}
    samples: ClassVar[Sequence[Sample]] = (*IMAGES, *VIDEOS)


class TestSharpness(RewardConformance):
    component = "sharpness"
    samples: ClassVar[Sequence[Sample]] = (*IMAGES, *VIDEOS)


def sheets(run_dir: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step_")) for path in (run_dir / "images").glob("step_*.png"))


class TestImages(WriterConformance):
    component = "images"
    options: ClassVar[Mapping[str, Any]] = {"every": 1}

    @classmethod
    def steps_written(cls, run_dir: Path) -> Sequence[int] | None:
        return sheets(run_dir)


class TestImagesWithVideos(TestImages):
    options: ClassVar[Mapping[str, Any]] = {"every": 1, "videos": True, "fps": 8}

    @classmethod
    def create(cls) -> Any:
        pytest.importorskip("av", reason="pip install 'mmrl-core[video]'")
        return super().create()


class TestTensorboardWithImages(WriterConformance):
    component = "tensorboard"
    options: ClassVar[Mapping[str, Any]] = {"samples_every": 1, "step_images": 8}


class TestRewardHistory(WriterConformance):
    component = "reward_history"

    @classmethod
    def steps_written(cls, run_dir: Path) -> Sequence[int] | None:
        values = read_history(run_dir / "reward_history.txt")
        assert values == pytest.approx([0.1 * step for step in range(1, len(values) + 1)])
        assert len(values) <= STEPS
        return range(1, len(values) + 1)
