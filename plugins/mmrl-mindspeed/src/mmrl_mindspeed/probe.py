"""Which Megatron and which MindSpeed are here. Imports no torch, megatron or mindspeed: metadata and files only."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from pathlib import Path

from packaging.specifiers import SpecifierSet

from mmrl_core.hookspecs import Probe

VERSIONS = ">=0.12.1,<0.17"
"""Of megatron-core that this plugin is written for; the same range is in its package metadata."""


def megatron() -> Probe:
    """Whether a megatron-core of a supported version is installed, and where."""
    install = f'pip install "megatron-core{VERSIONS}"'
    try:
        distribution = importlib.metadata.distribution("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        return Probe(available=False, reason="megatron-core is not installed", cure=install)
    version, python = distribution.version, platform.python_version()
    required = distribution.metadata.json.get("requires_python", "")
    if not SpecifierSet(str(required)).contains(python, prereleases=True):
        reason = f"megatron-core {version} needs Python {required}, and this is {python}"
        return Probe(available=False, reason=reason, cure=install)
    if not SpecifierSet(VERSIONS).contains(version, prereleases=True):
        reason = f"megatron-core {version} is installed on Python {python}; this plugin works with {VERSIONS}"
        return Probe(available=False, reason=reason, cure=install)
    spec = importlib.util.find_spec("megatron.core")
    if spec is None or spec.origin is None:
        reason = f"megatron-core {version} is installed, but there is no package megatron.core"
        return Probe(available=False, reason=reason, cure=f"{install} --force-reinstall")
    return Probe(available=True, reason=f"megatron-core {version} in {Path(spec.origin).parent}")


def mindspeed() -> Probe:
    """Whether MindSpeed is the real one; only Ascend needs it."""
    from mmrl_mindspeed.adaptor import CURE, installed

    found = installed()
    if found.kind == "real":
        return Probe(available=True, reason=str(found))
    return Probe(available=False, reason=f"{found}; only device npu needs it", cure=CURE)
