"""Whether the optional prompt sources can be used here, answered without importing them."""

from __future__ import annotations

import importlib.metadata
import importlib.util

from mmrl_core.hookspecs import Probe

REASONING_GYM_CURE = "pip install 'mmrl-core[reasoning-gym]'"


def reasoning_gym() -> Probe:
    """Whether the reasoning-gym package is installed."""
    if importlib.util.find_spec("reasoning_gym") is None:
        return Probe(available=False, reason="the package reasoning-gym is not installed", cure=REASONING_GYM_CURE)
    try:
        return Probe(available=True, reason=f"reasoning-gym {importlib.metadata.version('reasoning-gym')}")
    except importlib.metadata.PackageNotFoundError:
        return Probe(available=True, reason="reasoning-gym from a source folder")
