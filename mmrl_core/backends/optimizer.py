"""AdamW with a schedule and the non-finite guard, for sharded and plain parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mmrl_core.contracts import DeviceOps
from mmrl_core.errors import BackendError

if TYPE_CHECKING:
    from mmrl_core.recipe import OptimizerSpec


def learning_rate(spec: OptimizerSpec, update: int, total: int) -> float:
    """Learning rate of optimizer step `update` (0-based) of `total`: linear warm-up, then the schedule."""
    if update < spec.warmup_updates:
        return spec.lr * (update + 1) / spec.warmup_updates
    if spec.schedule == "constant":
        return spec.lr
    progress = (update - spec.warmup_updates) / max(1, total - spec.warmup_updates)
    progress = min(progress, 1.0)
    shape = 1.0 - progress if spec.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return spec.lr * (spec.min_lr_ratio + (1.0 - spec.min_lr_ratio) * shape)


def global_norm(parameters: Sequence[Tensor]) -> Tensor:
    """L2 norm of all gradients over all shards, the same scalar on every rank. Collective."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class UpdateGuard:
    """The schedule's clock and the non-finite guard: what optimizers of all backends have in common."""

    def __init__(self, spec: OptimizerSpec, total_updates: int) -> None:
        self.spec = spec
        self.total_updates = total_updates
        self.updates = 0
        """Updates applied or skipped so far: the schedule's clock."""
        self.skipped = 0
        """Consecutive skipped updates."""
        self.last_lr = learning_rate(spec, 0, total_updates)

    def admits(self, norm: float) -> bool:
        """Begin the next update: set `last_lr`, and say whether a gradient of this norm may be applied.

        Raises BackendError after too many non-finite ones in a row. Every rank passes the same norm.
        """
        self.last_lr = learning_rate(self.spec, self.updates, self.total_updates)
        self.updates += 1
        if math.isfinite(norm):
            self.skipped = 0
            return True
        self.skipped += 1
        if self.skipped >= self.spec.max_skipped_updates:
            raise BackendError(
                f"{self.skipped} updates in a row had a non-finite gradient (norm {norm}); nothing was "
                "applied. Lower optimizer.lr, or look at rewards and log-probs of the last steps in metrics.jsonl"
            )
        return False


class AdamW(UpdateGuard):
    """torch's AdamW, its learning rate a function of the number of updates, guarded against non-finite gradients."""

    def __init__(
        self, parameters: Sequence[Tensor], spec: OptimizerSpec, total_updates: int, device: DeviceOps
    ) -> None:
        assert parameters, "nothing to train"
        super().__init__(spec, total_updates)
        self.parameters = list(parameters)
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": spec.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.torch_optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=spec.lr,
            betas=spec.betas,
            eps=spec.eps,
            fused="adamw" in device.fused_ops(),
        )

    def step(self, norm: Tensor) -> bool:
        """Clip to the recipe's norm and update, or skip when `norm` is not finite. Returns whether it updated.

        Raises BackendError after too many skips in a row. Every rank passes the same norm.
        """
        if not self.admits(float(norm)):
            self.zero_grad()
            return False
        if self.spec.clip_grad is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.spec.clip_grad, norm)
        for group in self.torch_optimizer.param_groups:
            group["lr"] = self.last_lr
        self.torch_optimizer.step()
        self.zero_grad()
        return True

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self.torch_optimizer.zero_grad(set_to_none=True)

    def move(self, device: torch.device) -> None:
        """Move the state to another device."""
        for state in self.torch_optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.ndim > 0:
                    state[name] = value.to(device)
