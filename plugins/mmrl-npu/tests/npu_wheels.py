"""Wheels of torch-npu as data: downloaded and unpacked, never installed."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

_UNUSED = ("torch_npu/include/", "torch_npu/csrc/", "torch_npu/testing/")
"""Folders for those who compile against it, or test it."""


def download(version: str, folder: Path) -> Path:
    """The wheel of this version (25 to 44 MB) for Linux on x86-64 and Python 3.11. Skips the test, saying why, where no
    index has it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    options = ["--no-deps", "--only-binary=:all:", "--python-version", "3.11"]
    wanted = ["--platform", "manylinux_2_28_x86_64", f"torch-npu=={version}", "--dest", str(folder)]
    done = subprocess.run([*command, *options, *wanted], capture_output=True, text=True, check=False, timeout=500)
    found = sorted(folder.glob("torch_npu-*.whl"))
    if done.returncode != 0 or not found:
        pytest.skip(f"no wheel of torch-npu {version} can be had here: {done.stderr.strip()[-300:]}")
    return found[0]


def unpack(wheel: Path, folder: Path) -> Path:
    """`folder`, with what of the wheel an import needs (110 MB); the wheel itself is removed."""
    with zipfile.ZipFile(wheel) as archive:
        needed = [name for name in archive.namelist() if not name.startswith(_UNUSED) and not name.endswith(".a")]
        archive.extractall(folder, needed)
    wheel.unlink()
    return folder
