"""Where a tensor lives, and the vendor's library once it is needed."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

DEVICE = "npu"
"""The type of torch device whose tensors take the fused operators."""


def on_npu(tensor: Tensor) -> bool:
    """Whether the fused operators apply to `tensor`."""
    return tensor.device.type == DEVICE


def torch_npu() -> Any:
    """The module `torch_npu`, imported at its first use: a tensor on an NPU is there, so it can be."""
    return importlib.import_module("torch_npu")
