"""Whether Ray is installed. Imports no ray: metadata only."""

from __future__ import annotations

import importlib.metadata

from packaging.specifiers import SpecifierSet

from mmrl_core.hookspecs import Probe

VERSIONS = ">=2.40"
"""Of Ray that this plugin is written for; the same range is in its package metadata."""


def ray() -> Probe:
    """Whether a Ray of a supported version is installed. Says nothing of a cluster: the recipe names that."""
    cure = f'pip install "ray{VERSIONS}"'
    try:
        version = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        return Probe(available=False, reason="ray is not installed", cure=cure)
    if not SpecifierSet(VERSIONS).contains(version, prereleases=True):
        return Probe(
            available=False, reason=f"ray {version} is installed; this plugin works with {VERSIONS}", cure=cure
        )
    return Probe(available=True, reason=f"ray {version}")
