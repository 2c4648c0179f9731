"""A tiny HPSv3, written once, and samples to score."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmrl_hpsv3.options import HpsV3Options
from mmrl_hpsv3.reward import HpsV3
from mmrl_hpsv3.tiny import write_tiny

from mmrl_core import Sample
from mmrl_core.contracts import Prompt


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The options `checkpoint` and `base`. Tests copy before they change a file."""
    return write_tiny(tmp_path_factory.mktemp("hpsv3"))


@pytest.fixture(scope="session")
def reward(tiny: dict[str, str]) -> HpsV3:
    """Set up on the CPU, in float32, with default options."""
    made = HpsV3(HpsV3Options(**tiny))
    made.setup("cpu")
    return made


@pytest.fixture(scope="session")
def sample() -> Callable[..., Sample]:
    """(seed, shape [H, W] or [F, H, W], prompt) -> a sample of noise; NumPy's old generator is the same everywhere."""

    def make(seed: int, shape: tuple[int, ...], prompt: str, **other: Any) -> Sample:
        pixels = np.random.RandomState(seed).randint(0, 256, (*shape, 3), dtype=np.uint8)
        picture = {"image" if len(shape) == 2 else "video": pixels}
        return Sample(sample_id=seed, group_id=0, prompt=Prompt(index=0, text=prompt), **{**picture, **other})

    return make


@pytest.fixture
def copied(tiny: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """A copy of the tiny files that a test may damage."""
    import shutil

    checkpoint = shutil.copy(tiny["checkpoint"], tmp_path)
    base = shutil.copytree(tiny["base"], tmp_path / "base")
    return {"checkpoint": str(checkpoint), "base": str(base)}
