"""`VerlFsdp2Backend`: the contract between mmrl and verl's FSDP2 engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from mmrl_core.backends import sharded_checkpoint, weight_stream
from mmrl_core.backends.optimizer import AdamW, global_norm
from mmrl_core.contracts import (
    Bucket,
    Loss,
    Minibatch,
    Policy,
    Record,
    Replica,
    Rollouts,
    RunContext,
    TrainingSpec,
)
from mmrl_core.policies.causal_lm import TextNetwork
from mmrl_verl.building import Plan
from mmrl_verl.engine import PRECISION, build
from mmrl_verl.engine_backend import VerlEngineBackend

if TYPE_CHECKING:
    from mmrl_verl.options import VerlFsdp2Options


class VerlFsdp2Backend(VerlEngineBackend):
    """Training with `verl.workers.engine.FSDPEngineWithLMHead`: its model, sharding, forward and backward; the
    recipe's loss, optimizer and guard."""

    name = "verl-fsdp2"
    precisions = tuple(PRECISION)
    options: VerlFsdp2Options
    optimizer: AdamW
    module: nn.Module
    """Its network under the names and behind the door that text policies use."""

    def setup(self, context: RunContext, policy: Policy, training: TrainingSpec) -> None:
        self.context, self.training = context, training
        self.policy = self._supported(policy, context)
        self.engine, adamw = build(self._plan(trained=True))
        assert adamw is not None
        self.optimizer = adamw
        self.module = TextNetwork(self.engine.module)
        own_reference = training.reference and policy.model.lora is None
        self.reference_engine = build(self._plan(trained=False))[0] if own_reference else None

    def _plan(self, *, trained: bool) -> Plan[VerlFsdp2Options]:
        return Plan(
            context=self.context, policy=self.policy, training=self.training, options=self.options, trained=trained
        )

    @property
    def replica(self) -> Replica:
        world = self.context.world
        return Replica(index=world.rank, count=world.size, is_root=True)

    def reference(self, rollouts: Rollouts) -> Record:
        assert self.training.reference, "no reference was asked for at set-up"
        if self.reference_engine is not None:
            stats = self._infer(self.reference_engine, rollouts, entropy=False)
        else:
            with self.policy.reference_network(self.module):
                stats = self._infer(self.engine, rollouts, entropy=False)
        return {"log_probs": list(stats.log_probs)}

    # -------------------------------------------------------------------------------------------------------- training

    def _step(self) -> tuple[float, bool]:
        # the norm is over all shards, so every rank sees the same number and takes the same decision
        norm = global_norm(self.optimizer.parameters)
        applied = self.optimizer.step(norm)
        return float(norm), applied

    def _zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def gradients(self, minibatch: Minibatch, loss: Loss) -> Iterator[Bucket]:
        self._backward(minibatch, loss)
        for name, parameter in self.module.named_parameters():
            if parameter.grad is not None:
                yield [(self.policy.weight_name(name), weight_stream.full(parameter.grad))]
        self.optimizer.zero_grad()

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
        sharded_checkpoint.save(
            directory, self.module, self.optimizer, backend=self.name, optimizer=optimizer, main=main
        )

    def load(self, directory: Path, *, optimizer: bool) -> None:
        sharded_checkpoint.load(directory, self.module, self.optimizer, backend=self.name, optimizer=optimizer)
