"""What mmrl relies on in any reward, checked by its conformance kit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import hpsv2_tiny
import pytest
from mmrl_hpsv2 import plugin

from mmrl_core.contracts import Sample
from mmrl_core.plugins import load_plugins
from mmrl_core.testing.rewards import IMAGES, VIDEOS, RewardConformance, text_sample

(COMPONENT,) = plugin.mmrl_rewards()


class TestImages(RewardConformance):
    component = COMPONENT
    samples: ClassVar[Sequence[Sample]] = (*IMAGES, text_sample("no image"))
    extra: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def make_options(cls, folder: Path) -> Mapping[str, Any]:
        return {
            "checkpoint": str(hpsv2_tiny.write_checkpoint(folder / "tiny.pt", hpsv2_tiny.parameters())),
            "tokenizer": str(hpsv2_tiny.write_tokenizer(folder / "tokenizer")),
            **hpsv2_tiny.HEADS,
            **cls.extra,
        }


class TestVideos(TestImages):
    samples = (*VIDEOS, IMAGES[0])
    extra: ClassVar[Mapping[str, Any]] = {"video": "mean", "every": 2, "images_per_forward": 3}


def test_the_installed_distribution_declares_it_by_name() -> None:
    try:
        version = metadata.version("mmrl-hpsv2")
    except metadata.PackageNotFoundError:
        pytest.skip("mmrl-hpsv2 is imported from its source folder, not installed")
    found = load_plugins().get("reward", "hpsv2")
    assert (found.distribution, found.version) == ("mmrl-hpsv2", version)
    assert found.component == COMPONENT
    assert found.load().__name__ == "HpsV2"
