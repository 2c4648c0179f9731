"""Text policies on Megatron: the model, its optimizer, forward passes and updates of this rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from megatron.core import tensor_parallel
from torch import Tensor, nn

from mmrl_core.backends.micro_batches import LossSums, loss_batch, micro_batches, row_chunks
from mmrl_core.contracts import (
    ActionStats,
    Bucket,
    Loss,
    Minibatch,
    Record,
    Rollouts,
    RunContext,
    TokenPolicy,
    TrainingSpec,
)
from mmrl_core.rows import select_rows
from mmrl_mindspeed import model, pipeline, weights
from mmrl_mindspeed.layout import Weight
from mmrl_mindspeed.optimizer import MegatronAdamW, data_parallel
from mmrl_mindspeed.parallel import Layout
from mmrl_mindspeed.plan import TextPlan
from mmrl_mindspeed.rows import TokenRows, token_rows
from mmrl_mindspeed.segments import Segment, segments
from mmrl_mindspeed.token_stats import vocabulary_parallel_stats

if TYPE_CHECKING:
    from mmrl_mindspeed.options import MegatronOptions


class TextTraining:
    """One rank's share of a text model, and what is done with it. Methods are collective like those of the backend."""

    def __init__(
        self,
        context: RunContext,
        policy: TokenPolicy,
        training: TrainingSpec,
        options: MegatronOptions,
        layout: Layout,
        plan: TextPlan,
    ) -> None:
        self.context, self.policy, self.options, self.layout = context, policy, options, layout
        self.arch, self.stages = plan.arch, plan.stages
        self.device = context.device.torch_device
        self._dtype = getattr(torch, policy.model.dtype)
        tensor_parallel.model_parallel_cuda_manual_seed(context.seed)
        self.model = self._build(plan)
        self.ddp = data_parallel(self.model, self.model.config, distributed_optimizer=options.distributed_optimizer)
        self.optimizer = MegatronAdamW(self.ddp, training.optimizer, training.total_updates, context.world, self._dtype)
        if self._dtype != torch.float32:
            # not those that were rounded for the model
            self._load(self.model, plan, self._put_main_values)
        self.reference_model = self._build(plan).requires_grad_(False).eval() if training.reference else None

    def _build(self, plan: TextPlan) -> model.Stage:
        stage = model.build(
            plan.arch,
            self.layout,
            self.options,
            plan.rotary,
            self._dtype,
            self.device,
            stages=plan.stages,
            deterministic=self.context.deterministic,
        )
        self._load(stage, plan, lambda parameter, part: parameter.data.copy_(part))
        return stage

    def _load(self, stage: model.Stage, plan: TextPlan, put: Callable[[nn.Parameter, Tensor], object]) -> None:
        weights.load(stage, plan.reader(), plan.arch, self.layout, plan.stages, put)

    def _put_main_values(self, parameter: nn.Parameter, part: Tensor) -> None:
        main = self.optimizer.main_values(parameter)
        if main is not None:
            main.copy_(part)

    def named_shards(self) -> Iterator[tuple[Weight, nn.Parameter]]:
        """This rank's parameters, each with what it is a part of, in the model's order."""
        return model.named_shards(self.model, self.arch, self.layout, self.stages)

    def segments(self) -> Iterator[tuple[nn.Parameter, Sequence[Segment], bool]]:
        """See checkpoints.Trained."""
        for weight, parameter in self.named_shards():
            # of what several ranks hold one saves: the first of a tensor-parallel group, the embedding's own stage
            copy = weight.kind == "replicated" and self.layout.tensor_rank != 0
            copy = copy or (weight.name == "output_layer.weight" and self.arch.tied)
            yield parameter, segments(weight, self.arch, self.layout.tensor_rank, self.layout.tensor), not copy

    # ------------------------------------------------------------------------------------------------ forward passes

    def replay(self, rollouts: Rollouts) -> ActionStats:
        """See TrainingBackend.replay."""
        return self._stats(self.model, rollouts)

    def reference(self, rollouts: Rollouts) -> Record:
        """See TrainingBackend.reference."""
        assert self.reference_model is not None, "no reference was asked for at set-up"
        return {"log_probs": list(self._stats(self.reference_model, rollouts).log_probs)}

    def _stats(self, network: model.Stage, rollouts: Rollouts) -> ActionStats:
        options = self.options
        chunks = row_chunks(rollouts, options.micro_batch_groups, samples_per_chunk=options.micro_batch_samples)
        parts = [self._rows(select_rows(rollouts, rows)) for rows in chunks]
        log_probs = torch.zeros_like(rollouts.behaviour_log_probs)
        entropy = torch.zeros_like(log_probs)

        def finish(index: int, hidden: Tensor) -> ActionStats:
            return self._row_stats(network, hidden, parts[index])

        for rows, stats in zip(chunks, pipeline.forward(network, parts, finish, self.layout), strict=False):
            assert stats.entropy is not None
            log_probs[rows] = stats.log_probs.cpu()
            entropy[rows] = stats.entropy.cpu()
        return ActionStats(
            log_probs=pipeline.from_last_stage(log_probs, self.layout),
            entropy=pipeline.from_last_stage(entropy, self.layout),
        )

    def _rows(self, batch: Rollouts) -> TokenRows:
        multiple = self.layout.tensor if self.options.sequence_parallel else 1
        return token_rows(batch, self.policy.pad_id, multiple, self.device)

    def _row_stats(self, network: model.Stage, hidden: Tensor, rows: TokenRows) -> ActionStats:
        """Log-probs and entropy [b, T] out of the last stage's hidden states [s, b, H]."""
        if self.options.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
        log_probs, entropy = vocabulary_parallel_stats(
            hidden.flatten(0, 1).index_select(0, rows.sources),
            network.head_weight(),
            rows.targets,
            vocabulary=self.arch.vocab,
            rank=self.layout.tensor_rank,
            group=self.layout.tensor_group,
            temperature=self.policy.sampling.temperature or 1.0,
            logits_bytes=self.policy.options.logits_memory_mb << 20,
        )
        zeros = torch.zeros(rows.taken.shape, dtype=torch.float32, device=self.device)
        return ActionStats(
            log_probs=zeros.masked_scatter(rows.taken, log_probs),
            entropy=zeros.masked_scatter(rows.taken, entropy),
        )

    # -------------------------------------------------------------------------------------------------------- training

    def backward(self, minibatch: Minibatch, loss: Loss) -> dict[str, float]:
        """Sum the loss's gradients over micro-batches and replicas into `main_grad`; the loss's totals."""
        self.optimizer.zero_grad()
        options, world = self.options, self.context.world
        batches = list(
            micro_batches(minibatch, options.micro_batch_groups, world, samples_per_chunk=options.micro_batch_samples)
        )
        parts = [self._rows(batch.rollouts) for batch in batches]
        totals = LossSums()

        def differentiated(index: int, hidden: Tensor) -> Tensor:
            stats = self._row_stats(self.model, hidden, parts[index])
            if not loss.entropy_gradient:
                assert stats.entropy is not None
                stats.entropy = stats.entropy.detach()
            output = loss(stats, loss_batch(batches[index], slice(0, parts[index].taken.shape[1]), self.device))
            totals.add(output)
            return output.loss

        pipeline.forward_backward(self.ddp, parts, differentiated)
        self.optimizer.sum_gradients()
        shared: LossSums = pipeline.object_from_last_stage(totals, self.layout)
        return shared.reduce(world, contributes=self.layout.replica.is_root)

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

        def gradient(parameter: nn.Parameter) -> Tensor:
            main: Tensor = parameter.main_grad  # type: ignore[attr-defined]
            return main

        yield from weights.stream(self.model, gradient, self.arch, self.layout, self.stages)
        self.optimizer.zero_grad()

    # --------------------------------------------------------------------------------------------------------- weights

    def whole_module(self) -> nn.Module | None:
        """A module that generates without other ranks: Megatron's cannot."""
        return None

    def resident(self) -> Iterator[Tensor]:
        """What offloading moves."""
        for network in (self.model, self.reference_model):
            if network is not None:
                yield from network.parameters()
                yield from network.buffers()
        yield from self.optimizer.resident()

    def export_weights(self, form: Literal["merged", "adapter"] = "merged") -> Iterator[Bucket]:
        """See TrainingBackend.export_weights."""
        assert form == "merged", "without model.lora there are no adapters"
        return weights.stream(self.model, lambda p: p, self.arch, self.layout, self.stages)
