"""What engines that run a torch module in this process share: whose weights they use, and how new ones arrive."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import nn

from mmrl_core.contracts import Bucket, Policy, Replica, RolloutEngine, RunContext, TrainingBackend
from mmrl_core.errors import RolloutError


class ModuleOptions(Protocol):
    """The options such an engine has."""

    @property
    def weights(self) -> Literal["auto", "shared", "own"]: ...
    @property
    def dtype(self) -> str | None: ...


class ModuleEngine(RolloutEngine):
    """Every rank is an engine replica, and generates with the training network or with a copy of its own."""

    deterministic = True

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.weights: Literal["own", "shared"] = "own"  # until `setup` knows the backend
        self._own: nn.Module | None = None
        self._version = 0

    def setup(self, context: RunContext, policy: Policy, backend: TrainingBackend | None) -> None:
        self.context, self.policy, self.backend = context, policy, backend
        self.weights = _weights(self.options.weights, backend)
        if self.weights == "own":
            module = policy.load(getattr(torch, self.dtype), adapters=False).requires_grad_(False)
            self._own = module.to(context.device.torch_device)

    @property
    def dtype(self) -> str:
        """Precision in which this engine computes."""
        own: str | None = self.options.dtype if self.weights == "own" else None
        return own or self.policy.model.dtype

    @property
    def replica(self) -> Replica:
        world = self.context.world
        return Replica(index=world.rank, count=world.size, is_root=True)

    @contextmanager
    def network(self) -> Iterator[nn.Module]:
        """The module to generate with."""
        if self._own is not None:
            yield self._own
            return
        assert self.backend is not None
        with self.backend.inference_module() as module:
            yield module

    @torch.no_grad()
    def update_weights(self, weights: Iterator[Bucket] | None, version: int) -> None:
        self._version = version
        if self._own is None:
            assert weights is None
            return
        assert weights is not None
        targets = {self.policy.weight_name(n): p for n, p in self._own.named_parameters()}
        for bucket in weights:
            for name, tensor in bucket:
                if name not in targets:
                    raise RolloutError(f"weight {name!r} has no place in the engine's copy of {self.policy.model.path}")
                targets.pop(name).copy_(tensor)
        if targets:
            raise RolloutError(f"the weight stream left out {sorted(targets)[:3]} ({len(targets)} in all)")


def _weights(asked: Literal["auto", "shared", "own"], backend: TrainingBackend | None) -> Literal["own", "shared"]:
    """Whose weights to generate with. Raises RolloutError when the backend's are asked for and not on offer."""
    if backend is None or asked == "own":
        return "own"  # without a backend there is no training network to share
    if backend.shares_module:
        return "shared"
    if asked == "shared":
        raise RolloutError(
            f"rollout.weights: shared, but {type(backend).__name__} divides the training network over ranks, so that "
            "none can generate with it alone. Use weights: auto or own: the engine then holds a copy"
        )
    return "own"
