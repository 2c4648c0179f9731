"""A stand-in for torch_npu on an emulated device, for tests. Not the vendor's package, and not a line of it.

Importing it gives PyTorch a device `npu`: its memory in the host's, its kernels the CPU's (see `extension.cpp`). As
with the vendor's, `import torch` imports it by itself where its metadata is on the path. Two variables reach every
process:

- NPU_EMULATOR_REFUSE: types and operators, by name, that the device has not: `float64,aten::digamma`;
- NPU_EMULATOR_LOG: a folder that takes the names of the operators that ran on the device, a file a process.
"""

from __future__ import annotations

import os

_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
_given = os.environ.get(_AUTOLOAD)
os.environ[_AUTOLOAD] = "0"  # torch would import this module once more while it is being imported

import torch  # noqa: E402

from torch_npu import build  # noqa: E402

__version__ = "2.13.0+emulated"

torch.utils.rename_privateuse1_backend("npu")
_device = build.load()

from torch_npu import device_module as npu  # noqa: E402
from torch_npu.fused import *  # noqa: E402, F403


def _autoload() -> None:
    """What torch's entry point calls; everything has happened by then."""
    if _given is None:
        os.environ.pop(_AUTOLOAD, None)
    else:
        os.environ[_AUTOLOAD] = _given


_autoload()
npu.install()
