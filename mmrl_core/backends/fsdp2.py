"""Training with PyTorch `fully_shard` (FSDP2): every rank is a replica and holds a shard of everything."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from mmrl_core.backends import sharded_checkpoint, weight_stream
from mmrl_core.backends.compiled import compile_units, refuse_unless_compilable
from mmrl_core.backends.micro_batches import LossSums, accumulate, micro_batches, padded_chunks, row_chunks
from mmrl_core.backends.optimizer import AdamW, global_norm
from mmrl_core.contracts import (
    ActionStats,
    Bucket,
    Loss,
    LossOutput,
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
from mmrl_core.rows import select_rows

if TYPE_CHECKING:
    from mmrl_core.backends.options import Fsdp2Options


class Fsdp2Backend(TrainingBackend):
    """`fully_shard` over all ranks. On one rank in fp32 nothing is sharded or cast, and the plain module is trained:
    the same numbers without FSDP's copies."""

    options: Fsdp2Options
    module: nn.Module

    def setup(self, context: RunContext, policy: Policy, training: TrainingSpec) -> None:
        self.context, self.policy, self.training = context, policy, training
        self.device = context.device.torch_device
        self._compute = getattr(torch, policy.model.dtype)
        if not context.device.supports(self._compute):
            raise BackendError(f"model.dtype {policy.model.dtype} is not supported on {context.device.name}")
        if self.options.compile != "none":
            refuse_unless_compilable(policy, self.device)
        if self.options.compile == "network" and (self._sharded or self.options.activation_checkpointing):
            raise BackendError(
                "backend.compile: network needs one rank, model.dtype: float32 and no activation checkpointing; here "
                f"are {context.world.size} rank(s), {policy.model.dtype}, and activation checkpointing "
                f"{'on' if self.options.activation_checkpointing else 'off'}. Use backend.compile: blocks"
            )
        self._own_reference = training.reference and policy.model.lora is None
        # adapters are drawn at random on every rank, and every rank then keeps its slice: the draws must be the same
        torch.manual_seed(context.seed)
        self.module = self._build(trained=True)
        self._reference = self._build(trained=False) if self._own_reference else None
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = AdamW(parameters, training.optimizer, training.total_updates, context.device)

    def _build(self, *, trained: bool) -> nn.Module:
        # fp32 master weights whatever the precision of forward and backward
        module = self.policy.load(torch.float32, adapters=trained)
        if self.options.compile == "network":
            compile_units([self.policy.network(module)])
        elif self.options.compile == "blocks":  # within what recomputes a block, and what gathers and frees its weights
            compile_units(self.policy.shard_units(module))
        if not trained:
            module.requires_grad_(False)
        elif self.options.activation_checkpointing:
            for unit in self.policy.shard_units(module):
                unit.forward = functools.partial(checkpoint, unit.forward, use_reentrant=False)
        if not self._sharded:
            return module.to(self.device)
        mesh = torch.distributed.device_mesh.init_device_mesh(self.device.type, (self.context.world.size,))
        # inputs stay as policies give them: casting all would round what must not be, such as a time. Activations are
        # in the compute dtype anyway, because the first layer's weights are
        precision = MixedPrecisionPolicy(
            param_dtype=self._compute,
            reduce_dtype=getattr(torch, self.options.reduce_dtype),
            cast_forward_inputs=False,
        )
        reshard = self.options.reshard_after_forward
        for unit in self.policy.shard_units(module):
            fully_shard(unit, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard)
        fully_shard(module, mesh=mesh, mp_policy=precision)
        module.to(self.device)
        for part in _sharded_parts(module):
            # our losses are sums; FSDP's default would divide by the number of ranks
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
        return module

    @property
    def _sharded(self) -> bool:
        return self.context.world.size > 1 or self._compute != torch.float32

    @property
    def replica(self) -> Replica:
        world = self.context.world
        return Replica(index=world.rank, count=world.size, is_root=True)

    # ------------------------------------------------------------------------------------------------ forward passes

    @torch.no_grad()
    def replay(self, rollouts: Rollouts) -> ActionStats:
        log_probs = torch.zeros_like(rollouts.behaviour_log_probs)
        entropy = torch.zeros_like(log_probs)
        plan = self._plan(rollouts)
        for rows, real in self._chunks(rollouts):
            for part in self.policy.action_slices(rollouts.mask.shape[1]):
                stats = self.policy.replay(self.module, select_rows(rollouts, rows), actions=part, plan=plan)
                if real:
                    log_probs[rows, part] = stats.log_probs.cpu()
                    if stats.entropy is not None:
                        entropy[rows, part] = stats.entropy.cpu()
        return ActionStats(log_probs=log_probs, entropy=entropy)

    @torch.no_grad()
    def reference(self, rollouts: Rollouts) -> Record:
        assert self.training.reference, "no reference was asked for at set-up"
        record: Record = {}
        plan = self._plan(rollouts)
        network = self._reference if self._reference is not None else self.module
        switched = nullcontext() if self._own_reference else self.policy.reference_network(network)
        with switched:
            for rows, real in self._chunks(rollouts):
                part = self.policy.reference_record(network, select_rows(rollouts, rows), plan=plan)
                if real:
                    for name, values in part.items():
                        record.setdefault(name, []).extend(values)
        return record

    def _chunks(self, rollouts: Rollouts) -> list[tuple[list[int], bool]]:
        options = self.options
        return padded_chunks(
            rollouts,
            options.micro_batch_groups,
            self.context.world,
            samples_per_chunk=options.micro_batch_samples,
        )

    def _plan(self, rollouts: Rollouts) -> int:
        """One plan for a pass on every rank: different forwards would mean different collectives."""
        options, plan = self.options, self.policy.plan
        if options.micro_batch_samples is None:
            return self.context.world.maximum(plan(rollouts))
        # a part of a group may share less than the group
        parts = row_chunks(rollouts, options.micro_batch_groups, samples_per_chunk=options.micro_batch_samples)
        return self.context.world.maximum(max(plan(select_rows(rollouts, rows)) for rows in parts))

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
        self.optimizer.zero_grad()
        totals = LossSums()
        plan = self._plan(minibatch.rollouts)
        options = self.options
        parts = micro_batches(
            minibatch,
            options.micro_batch_groups,
            self.context.world,
            samples_per_chunk=options.micro_batch_samples,
        )
        for part in parts:
            totals.add(self._micro_step(part, loss, plan))
        return totals.reduce(self.context.world)

    def _micro_step(self, part: Minibatch, loss: Loss, plan: int) -> LossOutput:
        def replay(actions: slice, gradient: bool) -> ActionStats:
            return self.policy.replay(
                self.module,
                part.rollouts,
                actions=actions,
                entropy_gradient=gradient and loss.entropy_gradient,
                reference=part.reference,
                plan=plan,
            )

        return accumulate(replay, part, loss, self.policy.action_slices(part.weight.shape[1]), self.device)

    # --------------------------------------------------------------------------------------------------------- weights

    @torch.no_grad()
    def export_weights(self, form: Literal["merged", "adapter"] = "merged") -> Iterator[Bucket]:
        yield from weight_stream.export(self.module, self.policy, form)

    @contextmanager
    def inference_module(self) -> Iterator[nn.Module]:
        parts = _sharded_parts(self.module)
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        try:
            yield self.module
        finally:
            root = self.module
            for part in parts:
                part.set_reshard_after_forward(part is not root and self.options.reshard_after_forward, recurse=False)
                part.reshard()

    def save(self, directory: Path, *, optimizer: bool) -> None:
        main = self.context.world.is_main
        sharded_checkpoint.save(directory, self.module, self.optimizer, backend="fsdp2", optimizer=optimizer, main=main)

    def load(self, directory: Path, *, optimizer: bool) -> None:
        sharded_checkpoint.load(directory, self.module, self.optimizer, backend="fsdp2", optimizer=optimizer)

    def offload(self) -> None:
        if self.options.offload and self.device.type != "cpu":
            self._move(torch.device("cpu"))
            self.context.device.empty_cache()

    def onload(self) -> None:
        if self.options.offload and self.device.type != "cpu":
            self._move(self.device)

    def _move(self, device: torch.device) -> None:
        self.module.to(device)
        if self._reference is not None:
            self._reference.to(device)
        self.optimizer.move(device)


def _sharded_parts(module: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was applied to, root included."""
    return [m for m in module.modules() if isinstance(m, FSDPModule)]
