"""Policies whose network is one ordinary module (`flow`) on Megatron: each rank a replica that has all of it.

Megatron's DDP sums the gradients and its DistributedOptimizer divides fp32 weights and moments over the ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Literal

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmrl_core.backends import weight_stream
from mmrl_core.backends.micro_batches import LossSums, accumulate, micro_batches, row_chunks
from mmrl_core.contracts import (
    ActionStats,
    Bucket,
    DenoisingPolicy,
    Loss,
    LossOutput,
    Minibatch,
    Record,
    Rollouts,
    RunContext,
    TrainingSpec,
)
from mmrl_core.errors import BackendError
from mmrl_core.rows import select_rows
from mmrl_mindspeed.optimizer import MegatronAdamW, data_parallel
from mmrl_mindspeed.segments import Segment, whole

if TYPE_CHECKING:
    from mmrl_mindspeed.options import MegatronOptions
    from mmrl_mindspeed.parallel import Layout


def check(policy: DenoisingPolicy, options: MegatronOptions) -> None:
    """Raise BackendError for a layout that divides the network, which only Megatron's own models allow."""
    divided = {
        name: value for name in ("tensor_parallel", "pipeline_parallel") if (value := getattr(options, name)) != 1
    }
    if divided:
        asked = ", ".join(f"{name}: {value}" for name, value in divided.items())
        raise BackendError(
            f"backend megatron: {asked} divides a model that Megatron itself builds, and the policy "
            f"{type(policy).__name__} has an ordinary network. Set tensor_parallel and pipeline_parallel to 1: every "
            "rank is then a replica (its optimizer state is divided); or use backend: fsdp2, which divides weights too"
        )
    if policy.model.dtype == "float16":
        raise BackendError("backend megatron trains in float32 or bfloat16; model.dtype float16 needs loss scaling")


class DenoisingTraining:
    """The network, its optimizer, forward passes and updates of this rank; methods are collective as the backend's."""

    def __init__(
        self,
        context: RunContext,
        policy: DenoisingPolicy,
        training: TrainingSpec,
        options: MegatronOptions,
        layout: Layout,
    ) -> None:
        self.context, self.policy, self.options, self.layout = context, policy, options, layout
        self.device = context.device.torch_device
        self._dtype = getattr(torch, policy.model.dtype)
        # adapters are drawn at random on every rank, and must be the same
        torch.manual_seed(context.seed)
        network = policy.load(torch.float32)
        exact = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}
        self.module = self._placed(network)
        if options.activation_checkpointing:
            for unit in policy.shard_units(self.module):
                unit.forward = functools.partial(checkpoint, unit.forward, use_reentrant=False)
        self.ddp = data_parallel(self.module, _config(self._dtype), distributed_optimizer=options.distributed_optimizer)
        self.optimizer = MegatronAdamW(self.ddp, training.optimizer, training.total_updates, context.world, self._dtype)
        if self._dtype != torch.float32:
            self._set_main_values(exact)
        self._own_reference = training.reference and policy.model.lora is None
        self._reference: nn.Module | None = None
        if self._own_reference:
            self._reference = self._placed(policy.load(torch.float32, adapters=False)).requires_grad_(False)

    def _placed(self, network: nn.Module) -> nn.Module:
        """On the device, parameters in the compute precision; buffers keep theirs."""
        for parameter in network.parameters():
            parameter.data = parameter.data.to(self._dtype)
        return network.to(self.device)

    @torch.no_grad()
    def _set_main_values(self, exact: dict[str, Tensor]) -> None:
        """The optimizer's fp32 weights as they were loaded, not as the compute precision rounds them."""
        for name, parameter in self.module.named_parameters():
            main = self.optimizer.main_values(parameter) if name in exact else None
            if main is not None:
                main.copy_(exact[name])

    def segments(self) -> Iterator[tuple[nn.Parameter, Sequence[Segment], bool]]:
        """See checkpoints.Trained."""
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                yield parameter, whole(self.policy.weight_name(name), parameter.shape), True

    def whole_module(self) -> nn.Module | None:
        """A module that generates without other ranks."""
        return self.module

    def resident(self) -> Iterator[Tensor]:
        """See offload."""
        yield from self.module.parameters()
        yield from self.module.buffers()
        yield from self.optimizer.resident()
        if self._reference is not None:
            yield from self._reference.parameters()
            yield from self._reference.buffers()

    # ------------------------------------------------------------------------------------------------ forward passes

    @torch.no_grad()
    def replay(self, rollouts: Rollouts) -> ActionStats:
        """See TrainingBackend.replay."""
        log_probs = torch.zeros_like(rollouts.behaviour_log_probs)
        for rows in self._chunks(rollouts):
            batch = select_rows(rollouts, rows)
            for part in self.policy.action_slices(rollouts.mask.shape[1]):
                log_probs[rows, part] = self.policy.replay(self.module, batch, actions=part).log_probs.cpu()
        return ActionStats(log_probs=log_probs, entropy=torch.zeros_like(log_probs))

    @torch.no_grad()
    def reference(self, rollouts: Rollouts) -> Record:
        """See TrainingBackend.reference."""
        network = self.module if self._reference is None else self._reference
        record: Record = {}
        with nullcontext() if self._own_reference else self.policy.reference_network(network):
            for rows in self._chunks(rollouts):
                part = self.policy.reference_record(network, select_rows(rollouts, rows))
                for name, values in part.items():
                    record.setdefault(name, []).extend(values)
        return record

    def _chunks(self, rollouts: Rollouts) -> list[list[int]]:
        """No rank waits for another in a forward, so they need not be as many everywhere."""
        options = self.options
        return row_chunks(rollouts, options.micro_batch_groups, samples_per_chunk=options.micro_batch_samples)

    # -------------------------------------------------------------------------------------------------------- training

    def backward(self, minibatch: Minibatch, loss: Loss) -> dict[str, float]:
        """Sum the loss's gradients over micro-batches and replicas into `main_grad`; the loss's totals."""
        self.optimizer.zero_grad()
        totals, options, world = LossSums(), self.options, self.context.world
        for part in micro_batches(
            minibatch, options.micro_batch_groups, world, samples_per_chunk=options.micro_batch_samples
        ):
            totals.add(self._micro_step(part, loss))
        self.optimizer.sum_gradients()
        return totals.reduce(world)

    def _micro_step(self, part: Minibatch, loss: Loss) -> LossOutput:
        def replay(actions: slice, gradient: bool) -> ActionStats:
            return self.policy.replay(
                self.ddp.module,
                part.rollouts,
                actions=actions,
                entropy_gradient=gradient and loss.entropy_gradient,
                reference=part.reference,
            )

        return accumulate(replay, part, loss, self.policy.action_slices(part.weight.shape[1]), self.device)

    def step(self) -> dict[str, float]:
        """Apply what `backward` summed; metrics."""
        norm, applied = self.optimizer.step()
        return {
            "grad_norm": norm,
            "actor/lr": self.optimizer.last_lr,
            "actor/skipped_updates": 0.0 if applied else 1.0,
        }

    def gradients(self) -> Iterator[Bucket]:
        """What `backward` summed, by Hugging Face name; dropped afterwards."""
        self.optimizer.gather_gradients(self.layout.data_group)
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                yield [(self.policy.weight_name(name), parameter.main_grad)]  # type: ignore[attr-defined]
        self.optimizer.zero_grad()

    # --------------------------------------------------------------------------------------------------------- weights

    @torch.no_grad()
    def export_weights(self, form: Literal["merged", "adapter"]) -> Iterator[Bucket]:
        """See TrainingBackend.export_weights. Every rank has all weights."""
        yield from weight_stream.export(self.module, self.policy, form)


def _config(dtype: torch.dtype) -> TransformerConfig:
    """What Megatron's DDP and optimizer read of a model's config; the network's own sizes are not their business."""
    return TransformerConfig(
        num_layers=1,
        hidden_size=1,
        num_attention_heads=1,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True,
    )
