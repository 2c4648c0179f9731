"""Whether optional writers can run here. This module imports no torch and none of the libraries it asks about."""

from __future__ import annotations

import importlib.metadata

from mmrl_core.hookspecs import Probe


def wandb() -> Probe:
    """Whether wandb is installed."""
    try:
        return Probe(available=True, reason=f"wandb {importlib.metadata.version('wandb')}")
    except importlib.metadata.PackageNotFoundError:
        return Probe(available=False, reason="wandb is not installed", cure="pip install 'mmrl-core[wandb]'")
