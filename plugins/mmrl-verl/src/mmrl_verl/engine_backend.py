"""`VerlEngineBackend`: what training with any of verl's engines has in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from mmrl_core.backends.micro_batches import LossSums, loss_batch
from mmrl_core.backends.optimizer import UpdateGuard
from mmrl_core.contracts import ActionStats, Loss, Minibatch, Policy, Rollouts, RunContext, TrainingBackend
from mmrl_core.errors import BackendError
from mmrl_core.policies.causal_lm import CausalLmPolicy
from mmrl_verl import token_batches

T = TypeVar("T")


class EngineOptions(Protocol):
    """The options that batches depend on."""

    @property
    def micro_batch_samples(self) -> int: ...
    @property
    def remove_padding(self) -> bool: ...
    @property
    def offload(self) -> bool: ...


class VerlEngineBackend(TrainingBackend):
    """Batches in verl's form, passes through verl's engine, and the recipe's loss in verl's form of one."""

    name: ClassVar[str]
    """The component's word."""
    precisions: ClassVar[Sequence[str]]
    """What model.dtype may be."""
    options: EngineOptions
    context: RunContext
    policy: CausalLmPolicy
    engine: Any
    """verl's engine with the network under training."""
    reference_engine: Any = None
    """verl's engine with a frozen copy, or None where none is needed."""
    optimizer: UpdateGuard
    """The schedule's clock and the guard against gradients that are not finite."""

    def _supported(self, policy: Policy, context: RunContext) -> CausalLmPolicy:
        """The policy, when verl's engine replays it. Raises BackendError."""
        if not isinstance(policy, CausalLmPolicy):
            raise BackendError(
                f"backend {self.name} cannot train the policy {type(policy).__name__}; use backend: fsdp2"
            )
        if policy.model.dtype not in self.precisions:
            words = " or ".join(self.precisions)
            raise BackendError(f"backend {self.name} trains in {words}, and model.dtype is {policy.model.dtype}")
        if not context.device.supports(getattr(torch, policy.model.dtype)):
            raise BackendError(f"model.dtype {policy.model.dtype} is not supported on {context.device.name}")
        if policy.options.prefix_sharing == "on":
            raise BackendError(
                f"backend {self.name}: verl's engine computes each row's prompt, and model.policy.prefix_sharing is "
                "on; set it to auto or off, or use backend: fsdp2"
            )
        return policy

    # ------------------------------------------------------------------------------------------------ forward passes

    def replay(self, rollouts: Rollouts) -> ActionStats:
        return self._infer(self.engine, rollouts, entropy=True)

    def _infer(self, engine: Any, rollouts: Rollouts, *, entropy: bool) -> ActionStats:
        data, rows = self._batch(rollouts, entropy=entropy)
        with engine.eval_mode():
            # empty on a rank that does not hold the last layers
            output = engine.infer_batch(data).get("model_output")
        count = len(rollouts)

        def padded(values: Tensor) -> Tensor:
            return token_batches.actions(values, rollouts, rows)[:count].cpu()

        stats = None
        if output is not None:
            stats = ActionStats(
                log_probs=padded(output["log_probs"]), entropy=padded(output["entropy"]) if entropy else None
            )
        return self._everywhere(stats)

    def _batch(self, rollouts: Rollouts, *, entropy: bool) -> tuple[Any, list[int]]:
        """(verl's batch, its row numbers), in as many micro-batches on every rank."""
        most = -(-len(rollouts) // self.options.micro_batch_samples)
        pieces = self.context.world.maximum(most)
        rows = token_batches.spread(len(rollouts), pieces)
        data = token_batches.to_verl(
            rollouts,
            rows,
            micro_batch_size_per_gpu=len(rows) // pieces,
            use_remove_padding=self.options.remove_padding,
            calculate_entropy=entropy,
            temperature=self.policy.sampling.temperature or 1.0,
            pad_token_id=self.policy.pad_id,
        )
        return data, rows

    def _everywhere(self, value: T | None) -> T:
        """What the ranks with the last layers computed, on all ranks of the replica. None elsewhere. Collective."""
        assert value is not None, "verl's engine returned nothing"
        return value

    # -------------------------------------------------------------------------------------------------------- training

    def update(self, minibatch: Minibatch, loss: Loss) -> dict[str, float]:
        metrics = self._backward(minibatch, loss)
        norm, applied = self._step()
        return {
            **metrics,
            "grad_norm": norm,
            "actor/lr": self.optimizer.last_lr,
            "actor/skipped_updates": 0.0 if applied else 1.0,
        }

    @abstractmethod
    def _step(self) -> tuple[float, bool]:
        """(Gradient norm, the same on every rank; whether the update was applied). Collective."""

    @abstractmethod
    def _zero_grad(self) -> None:
        """Begin a new sum of gradients."""

    def _backward(self, minibatch: Minibatch, loss: Loss) -> dict[str, float]:
        """Gradients of the sum of the loss over micro-batches and replicas, in the parameters; the loss's totals."""
        self._zero_grad()
        totals = LossSums()
        data, _ = self._batch(minibatch.rollouts, entropy=True)
        device = self.context.device.torch_device

        def of_verl(model_output: dict[str, Tensor], data: Any, dp_group: Any) -> tuple[Tensor, dict[str, Any]]:
            """verl's form of a loss: of one micro-batch's jagged output."""
            rows = data["row"].tolist()
            micro_batch = token_batches.part(minibatch, rows)

            def padded(values: Tensor) -> Tensor:
                return token_batches.actions(values, minibatch.rollouts, rows)

            entropy = padded(model_output["entropy"])
            stats = ActionStats(
                log_probs=padded(model_output["log_probs"]),
                entropy=entropy if loss.entropy_gradient else entropy.detach(),
            )
            everything = slice(0, micro_batch.weight.shape[1])
            output = loss(stats, loss_batch(micro_batch, everything, device))
            totals.add(output)
            # verl's engines average gradients over replicas; ours is a sum
            return output.loss * self.replica.count, {}

        with self.engine.train_mode(zero_grad_on_exit=False):
            self.engine.forward_backward_batch(data, of_verl)
        shared = self._everywhere(totals if totals.sums else None)
        return shared.reduce(self.context.world, contributes=self.replica.is_root)

    # ---------------------------------------------------------------------------------------------------------- memory

    def offload(self) -> None:
        if self.options.offload and self.context.device.torch_device.type != "cpu":
            self._move("cpu")
            # verl copies in the background
            self.context.device.synchronize()
            self.context.device.empty_cache()

    def onload(self) -> None:
        if self.options.offload and self.context.device.torch_device.type != "cpu":
            self._move(self.context.device.torch_device.type)

    def _move(self, device: str) -> None:
        for engine in (self.engine, self.reference_engine):
            if engine is not None:
                engine.to(device)
