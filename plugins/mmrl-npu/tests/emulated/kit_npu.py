"""The conformance kit on the emulated device. Run by test_npu_emulated.py in a process that has it."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch

from mmrl_core.policies.flow.dit import ClassConditionalDiT, DitConfig, write_folder
from mmrl_core.testing.backends import BackendConformance
from mmrl_core.testing.denoising import DenoisingConformance
from mmrl_core.testing.devices import DeviceConformance
from mmrl_core.testing.engines import RolloutEngineConformance


class TestNpu(DeviceConformance):
    component = "npu"


class TestFsdp2OnNpu(BackendConformance):
    component = "fsdp2"
    device = "npu"
    equivalent_options: ClassVar = ({"micro_batch_samples": 2}, {"activation_checkpointing": True})


class TestHfOnNpu(RolloutEngineConformance):
    component = "hf"
    device = "npu"


class TestFlowOnNpu(DenoisingConformance):
    component = "flow"
    device = "npu"
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
