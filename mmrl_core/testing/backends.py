"""`BackendConformance`: what the core relies on in a training backend, proved on a tiny language model.

The reference everywhere is transformers' own forward and autograd, row by row, without padding, cache or sharding.
"""

from __future__ import annotations

from mmrl_core.testing.backend_gradients import GradientChecks
from mmrl_core.testing.backend_replicas import ReplicaChecks
from mmrl_core.testing.backend_updates import UpdateChecks
from mmrl_core.testing.backend_weights import WeightChecks
from mmrl_core.testing.components import ComponentConformance


class BackendConformance(GradientChecks, UpdateChecks, WeightChecks, ReplicaChecks, ComponentConformance):
    """Subclass it as `Test...`, name the `component`, and set the class attributes of `BackendStage` that differ.

    The component must be installed (`pip install -e .`), because ranks in other processes look it up by its word.
    """

    kind = "backend"
