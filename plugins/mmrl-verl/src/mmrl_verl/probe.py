"""Which verl is here. Imports neither torch nor verl: metadata and files only."""

from __future__ import annotations

import importlib.metadata

from packaging.specifiers import SpecifierSet

from mmrl_core.hookspecs import Probe

VERSIONS = ">=0.9.1,<0.10"
"""Of verl that this plugin is written for; the same range is in its package metadata."""


def verl() -> Probe:
    """Whether a verl of a supported version is installed."""
    cure = f'pip install "verl{VERSIONS}"'
    try:
        version = importlib.metadata.version("verl")
    except importlib.metadata.PackageNotFoundError:
        return Probe(available=False, reason="verl is not installed", cure=cure)
    if not SpecifierSet(VERSIONS).contains(version, prereleases=True):
        return Probe(
            available=False, reason=f"verl {version} is installed; this plugin works with {VERSIONS}", cure=cure
        )
    return Probe(available=True, reason=f"verl {version}")
