"""What mmrl relies on in any reward, checked by its conformance kit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmrl_hpsv3 import plugin
from mmrl_hpsv3.tiny import write_tiny

from mmrl_core.testing.rewards import IMAGES, VIDEOS, RewardConformance


class HpsV3Files(RewardConformance):
    component = plugin.mmrl_rewards()[0]
    tolerance = 1e-5

    @classmethod
    def make_options(cls, folder: Path) -> Mapping[str, Any]:
        return write_tiny(folder)


class TestImages(HpsV3Files):
    samples = IMAGES

    @classmethod
    def make_options(cls, folder: Path) -> Mapping[str, Any]:
        return {**super().make_options(folder), "scale": 0.5}


class TestVideos(HpsV3Files):
    samples = VIDEOS

    @classmethod
    def make_options(cls, folder: Path) -> Mapping[str, Any]:
        return {**super().make_options(folder), "video": "mean", "every": 4}
