"""Whether a device can be used here, answered in milliseconds. Imports no torch unless it is imported already."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import re
import shutil
import sys
from pathlib import Path

from mmrl_core.devices.cores import usable_cores
from mmrl_core.hookspecs import Probe

_DEV = Path("/dev")
_DRIVER_LIBRARIES = ("libcuda.so.1", "nvcuda.dll")
_INSTALL_TORCH = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128"


def cpu() -> Probe:
    """Always there."""
    return Probe(available=True, reason=f"{usable_cores()} cores, {platform.machine()}")


def cuda() -> Probe:
    """Needs an NVIDIA driver, a GPU that is visible, and a PyTorch built for CUDA."""
    torch = sys.modules.get("torch")
    if torch is not None:
        if torch.cuda.is_available():
            return Probe(available=True, reason=f"{torch.cuda.device_count()} GPU(s)")
        if torch.version.cuda is None and torch.version.hip is None:
            return _cpu_build(str(torch.__version__))
        return Probe(available=False, reason="torch.cuda.is_available() is false", cure=_look_at_the_driver())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        reason = f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU"
        return Probe(available=False, reason=reason, cure="unset CUDA_VISIBLE_DEVICES")
    if not _driver_library():
        return Probe(available=False, reason="no NVIDIA driver library (libcuda)", cure=_look_at_the_driver())
    nodes = sorted(p.name for p in _DEV.glob("nvidia[0-9]*"))
    if not nodes and not (_DEV / "dxg").exists() and sys.platform != "win32":  # dxg: GPUs under WSL
        return Probe(available=False, reason="no GPU device node (/dev/nvidia0)", cure=_look_at_the_driver())
    build = _torch_build()
    if build is None:
        return Probe(available=False, reason="PyTorch is not installed", cure="pip install torch")
    version, built_for_gpu = build
    if not built_for_gpu:
        return _cpu_build(version)
    return Probe(available=True, reason=f"{len(nodes) or 'some'} GPU(s), PyTorch {version}")


def _cpu_build(version: str) -> Probe:
    return Probe(available=False, reason=f"PyTorch {version} is a CPU-only build", cure=_INSTALL_TORCH)


def _look_at_the_driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "install the NVIDIA driver; in a container, start it with its GPUs (docker run --gpus all)"
    return "see what `nvidia-smi` says; it is installed, but a GPU cannot be used from this process"


def _driver_library() -> bool:
    for name in _DRIVER_LIBRARIES:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return True
    return False


def _torch_build() -> tuple[str, bool] | None:
    """(version, built for a GPU) read from PyTorch's version file, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    version = re.search(r"^__version__\b[^=]*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
    gpu = re.search(r"^(?:cuda|hip)\b[^=]*=\s*['\"]", text, re.MULTILINE)
    return (version.group(1) if version else "?", gpu is not None)
