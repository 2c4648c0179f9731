"""The denoising checks on every model family."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch

from mmrl_core.policies.flow.dit import ClassConditionalDiT, DitConfig, write_folder
from mmrl_core.testing.denoising import DenoisingConformance
from mmrl_core.testing.tiny_pipelines import TinyFamily, tiny_pipeline


class TestDit(DenoisingConformance):
    component = "flow"
    sampling_section: ClassVar = {"steps": 5, "height": 8, "width": 8}
    prompts = ("the digit 3", "the digit 7")

    @classmethod
    def pipeline(cls, folder: Path) -> Path:
        torch.manual_seed(0)
        config = DitConfig(sample_size=8, width=32, depth=2, heads=2, classes=[str(d) for d in range(10)])
        network = ClassConditionalDiT(config)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        write_folder(folder, network, shift=3.0)
        return folder


class Published(DenoisingConformance):
    """A tiny pipeline in the published folder format."""

    family: ClassVar[TinyFamily]
    component = "flow"
    options: ClassVar = {"max_text_tokens": 16}
    prompts = ("a red cat", "a blue dog on a hill")

    @classmethod
    def pipeline(cls, folder: Path) -> Path:
        return tiny_pipeline(folder, cls.family)


class TestFlux(Published):
    family = "flux"
    sampling_section: ClassVar = {"steps": 4, "height": 32, "width": 48}


class TestSd3(Published):
    family = "sd3"
    sampling_section: ClassVar = {"steps": 4, "height": 32, "width": 48}


class TestWan21(Published):
    family = "wan21"
    sampling_section: ClassVar = {"steps": 4, "height": 32, "width": 32, "frames": 5}


class TestWan22(Published):
    family = "wan22"
    sampling_section: ClassVar = {"steps": 4, "height": 64, "width": 64, "frames": 5}


del Published  # a base, not a test
