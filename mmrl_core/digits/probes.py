"""Whether what needs scikit-learn's digits can be used here, answered without importing it."""

from __future__ import annotations

import importlib.metadata
import importlib.util

from mmrl_core.hookspecs import Probe


def scikit_learn() -> Probe:
    """Whether scikit-learn is installed."""
    if importlib.util.find_spec("sklearn") is None:
        cure = "pip install 'mmrl-core[digits]'"
        return Probe(available=False, reason="the package scikit-learn is not installed", cure=cure)
    return Probe(available=True, reason=f"scikit-learn {importlib.metadata.version('scikit-learn')}")
