"""`VerlFsdp2Backend`: the contract between mmrl and verl's FSDP2 engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from mmrl_core.backends import sharded_checkpoint, weight_stream
from mmrl_core.backends.micro_batches import LossSums, loss_batch
from mmrl_core.backends.optimizer import AdamW, global_norm
from mmrl_core.contracts import (
    ActionStats,
    Bucket,
    Loss,
    Minibatch,
    Policy,
    Record,
    Replica,
    Rollouts,
    RunContext,
    TrainingBackend,
    TrainingSpec,
)
from mmrl_core.errors import BackendError
from mmrl_core.policies.causal_lm import CausalLmPolicy, TextNetwork
from mmrl_verl import token_batches
from mmrl_verl.engine import PRECISION, Plan, build

if TYPE_CHECKING:
    from mmrl_verl.options import VerlFsdp2Options

NAME = "verl-fsdp2"


class VerlFsdp2Backend(TrainingBackend):
    """Training with `verl.workers.engine.FSDPEngineWithLMHead`: its model, sharding, forward and backward; the
    recipe's loss, optimizer and guard."""

    options: VerlFsdp2Options
    engine: Any
    """verl's engine with the network under training."""
    module: nn.Module
    """Its network under the names and behind the door that text policies use."""

    def setup(self, context: RunContext, policy: Policy, training: TrainingSpec) -> None:
        self.context, self.training = context, training
        self.device = context.device.torch_device
        self.policy = _supported(policy, context)
        self.engine, adamw = build(self._plan(trained=True))
        assert adamw is not None
        self.optimizer: AdamW = adamw
        self.module = TextNetwork(self.engine.module)
        own_reference = training.reference and policy.model.lora is None
        self._reference = build(self._plan(trained=False))[0] if own_reference else None

    def _plan(self, *, trained: bool) -> Plan:
        return Plan(
            context=self.context, policy=self.policy, training=self.training, options=self.options, trained=trained
        )

    @property
    def replica(self) -> Replica:
        world = self.context.world
        return Replica(index=world.rank, count=world.size, is_root=True)

    # ------------------------------------------------------------------------------------------------ forward passes

    def replay(self, rollouts: Rollouts) -> ActionStats:
        return self._infer(self.engine, rollouts, entropy=True)

    def reference(self, rollouts: Rollouts) -> Record:
        assert self.training.reference, "no reference was asked for at set-up"
        if self._reference is not None:
            stats = self._infer(self._reference, rollouts, entropy=False)
        else:
            with self.policy.reference_network(self.module):
                stats = self._infer(self.engine, rollouts, entropy=False)
        return {"log_probs": list(stats.log_probs)}

    def _infer(self, engine: Any, rollouts: Rollouts, *, entropy: bool) -> ActionStats:
        data, rows = self._batch(rollouts, entropy=entropy)
        with engine.eval_mode():
            output = engine.infer_batch(data)["model_output"]
        count = len(rollouts)

        def padded(values: Tensor) -> Tensor:
            return token_batches.actions(values, rollouts, rows)[:count].cpu()

        return ActionStats(
            log_probs=padded(output["log_probs"]), entropy=padded(output["entropy"]) if entropy else None
        )

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

    # -------------------------------------------------------------------------------------------------------- training

    def update(self, minibatch: Minibatch, loss: Loss) -> dict[str, float]:
        metrics = self._backward(minibatch, loss)
        # the norm is over all shards, so every rank sees the same number and takes the same decision
        norm = global_norm(self.optimizer.parameters)
        applied = self.optimizer.step(norm)
        return {
            **metrics,
            "grad_norm": float(norm),
            "actor/lr": self.optimizer.last_lr,
            "actor/skipped_updates": 0.0 if applied else 1.0,
        }

    def gradients(self, minibatch: Minibatch, loss: Loss) -> Iterator[Bucket]:
        self._backward(minibatch, loss)
        for name, parameter in self.module.named_parameters():
            if parameter.grad is not None:
                yield [(self.policy.weight_name(name), weight_stream.full(parameter.grad))]
        self.optimizer.zero_grad()

    def _backward(self, minibatch: Minibatch, loss: Loss) -> dict[str, float]:
        """Gradients of the sum of the loss over micro-batches and ranks, in the parameters."""
        self.optimizer.zero_grad()
        totals = LossSums()
        data, _ = self._batch(minibatch.rollouts, entropy=True)

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
            output = loss(stats, loss_batch(micro_batch, everything, self.device))
            totals.add(output)
            # FSDP in verl's engine averages gradients over ranks; ours is a sum
            return output.loss * self.context.world.size, {}

        with self.engine.train_mode(zero_grad_on_exit=False):
            self.engine.forward_backward_batch(data, of_verl)
        return totals.reduce(self.context.world)

    # --------------------------------------------------------------------------------------------------------- weights

    @torch.no_grad()
    def export_weights(self, form: Literal["merged", "adapter"] = "merged") -> Iterator[Bucket]:
        yield from weight_stream.export(self.module, self.policy, form)

    @contextmanager
    def inference_module(self) -> Iterator[nn.Module]:
        parts = [m for m in self.module.modules() if isinstance(m, FSDPModule)]
        root, training = self.engine.module, self.module.training
        self.module.eval()
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        try:
            yield self.module
        finally:
            self.module.train(training)
            for part in parts:
                part.set_reshard_after_forward(part is not root and self.options.reshard_after_forward, recurse=False)
                part.reshard()

    def save(self, directory: Path, *, optimizer: bool) -> None:
        main = self.context.world.is_main
        sharded_checkpoint.save(directory, self.module, self.optimizer, backend=NAME, optimizer=optimizer, main=main)

    def load(self, directory: Path, *, optimizer: bool) -> None:
        sharded_checkpoint.load(directory, self.module, self.optimizer, backend=NAME, optimizer=optimizer)

    def offload(self) -> None:
        if self.options.offload and self.device.type != "cpu":
            self._move("cpu")
            # verl copies in the background
            self.context.device.synchronize()
            self.context.device.empty_cache()

    def onload(self) -> None:
        if self.options.offload and self.device.type != "cpu":
            self._move(self.device.type)

    def _move(self, device: str) -> None:
        for engine in (self.engine, self._reference):
            if engine is not None:
                engine.to(device)


def _supported(policy: Policy, context: RunContext) -> CausalLmPolicy:
    """The policy, when verl's engine replays it. Raises BackendError."""
    if not isinstance(policy, CausalLmPolicy):
        raise BackendError(f"backend {NAME} cannot train the policy {type(policy).__name__}; use backend: fsdp2")
    if policy.model.dtype not in PRECISION:
        words = " or ".join(PRECISION)
        raise BackendError(f"backend {NAME} trains in {words}, and model.dtype is {policy.model.dtype}")
    if not context.device.supports(getattr(torch, policy.model.dtype)):
        raise BackendError(f"model.dtype {policy.model.dtype} is not supported on {context.device.name}")
    if policy.options.prefix_sharing == "on":
        raise BackendError(
            f"backend {NAME}: verl's engine computes each row's prompt, and model.policy.prefix_sharing is on; "
            "set it to auto or off, or use backend: fsdp2"
        )
    return policy
