"""Compiles the emulated device, once for each version of its source, of PyTorch and of Python. Needs a C++ compiler."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).parent
NAME = "npu_emulator"
SOURCES = ("extension.cpp", "collectives.h")


def missing() -> str | None:
    """What keeps this machine from compiling the device, or None."""
    if compiler() is None:
        return "no C++ compiler (c++, g++ or clang++)"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "no Python headers (Python.h)"
    return None


def compiler() -> str | None:
    """The C++ compiler."""
    return next(
        (found for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and (found := shutil.which(name))),
        None,
    )


def library() -> Path:
    """The compiled device, compiling it when there is none; other processes that want it wait."""
    import torch

    digest = hashlib.sha256(f"{torch.__version__} {sys.version}".encode())
    for source in SOURCES:
        digest.update((HERE / source).read_bytes())
    folder = HERE.parent / "build"
    folder.mkdir(exist_ok=True)
    target = folder / f"{NAME}-{digest.hexdigest()[:16]}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _compile(target)
    return target


def load() -> ModuleType:
    """The device's Python bindings; importing them registers the device."""
    spec = importlib.util.spec_from_file_location(NAME, library())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(target: Path) -> None:
    from torch.utils import cpp_extension

    made: Any = target.with_suffix(f".{os.getpid()}")
    includes = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"], str(HERE)]
    libraries = cpp_extension.library_paths()
    command = [
        *(compiler(), "-shared", "-fPIC", "-std=c++20", "-O0", "-w", f"-DTORCH_EXTENSION_NAME={NAME}"),
        *(f"-I{folder}" for folder in includes),
        *(str(HERE / SOURCES[0]), "-o", str(made)),
        *(f"-L{folder}" for folder in libraries),
        *("-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the emulated npu does not compile:\n{done.stderr[-4000:]}")
    made.rename(target)
