"""The emulated device's fused operators without the device: on CPU tensors, in this process."""

from __future__ import annotations

import collections
import importlib.util
import sys
import types
from pathlib import Path

import pytest


def _load() -> types.ModuleType:
    """`emulator/torch_npu/fused.py` by itself: importing the package would make the device."""
    path = Path(__file__).parent / "emulator" / "torch_npu" / "fused.py"
    spec = importlib.util.spec_from_file_location("npu_fused_operators", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_fused = _load()
CALLS: collections.Counter[str] = _fused.CALLS
"""How often each operator ran."""
OPERATORS = _fused.OPERATORS
"""Those that patches call."""


def install(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[str]:
    """Make `import torch_npu` find these operators, and tensors on the CPU count as on an NPU. Returns CALLS, empty."""
    module = types.ModuleType("torch_npu")
    for operator in OPERATORS:
        setattr(module, operator.__name__, operator)
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    monkeypatch.setattr("mmrl_npu.patches.placement.DEVICE", "cpu")
    CALLS.clear()
    return CALLS
