"""`MegatronBackend`: the contract between mmrl and a model that Megatron divides over the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from mmrl_core.contracts import (
    ActionStats,
    Bucket,
    DenoisingPolicy,
    Loss,
    Minibatch,
    Policy,
    Record,
    Replica,
    Rollouts,
    RunContext,
    TokenPolicy,
    TrainingBackend,
    TrainingSpec,
)
from mmrl_core.errors import BackendError
from mmrl_mindspeed.adaptor import activate
from mmrl_mindspeed.cpu_patches import apply_for
from mmrl_mindspeed.megatron_import import import_megatron
from mmrl_mindspeed.offload import Offloaded

if TYPE_CHECKING:
    from mmrl_mindspeed.checkpoints import Trained
    from mmrl_mindspeed.denoising import DenoisingTraining
    from mmrl_mindspeed.options import MegatronOptions
    from mmrl_mindspeed.parallel import Layout
    from mmrl_mindspeed.text import TextTraining


class MegatronBackend(TrainingBackend):
    """Training with megatron-core: each replica is a block of tensor-parallel x pipeline-parallel ranks."""

    options: MegatronOptions
    layout: Layout
    work: TextTraining | DenoisingTraining
    """The network under training on this rank."""

    def setup(self, context: RunContext, policy: Policy, training: TrainingSpec) -> None:
        self.context, self.policy, self.training = context, policy, training
        self._away = Offloaded()
        if not context.device.supports(getattr(torch, policy.model.dtype)):
            raise BackendError(f"model.dtype {policy.model.dtype} is not supported on {context.device.name}")
        if not isinstance(policy, TokenPolicy | DenoisingPolicy):
            raise BackendError(f"backend megatron cannot train the policy {type(policy).__name__}; use backend: fsdp2")
        activate(context.device.name, self.options)
        import_megatron(context.device.name)
        # in force for as long as this process may run the model
        self._patches = apply_for(context.device.name)
        # modules that import megatron, which may not come before
        from mmrl_mindspeed import denoising
        from mmrl_mindspeed.parallel import check_world, establish
        from mmrl_mindspeed.plan import text_plan
        from mmrl_mindspeed.text import TextTraining

        check_world(self.options, context.world)
        if isinstance(policy, TokenPolicy):
            plan = text_plan(policy, self.options)
            self.layout = establish(self.options, context.world)
            self.work = TextTraining(context, policy, training, self.options, self.layout, plan)
        else:
            denoising.check(policy, self.options)
            self.layout = establish(self.options, context.world)
            self.work = denoising.DenoisingTraining(context, policy, training, self.options, self.layout)

    @property
    def replica(self) -> Replica:
        return self.layout.replica

    @property
    def trained(self) -> Trained:
        """What checkpoints hold."""
        return self.work

    def replay(self, rollouts: Rollouts) -> ActionStats:
        self.layout.activate()
        return self.work.replay(rollouts)

    def reference(self, rollouts: Rollouts) -> Record:
        self.layout.activate()
        return self.work.reference(rollouts)

    def update(self, minibatch: Minibatch, loss: Loss) -> dict[str, float]:
        self.layout.activate()
        metrics = self.work.backward(minibatch, loss)
        return {**metrics, **self.work.step()}

    def gradients(self, minibatch: Minibatch, loss: Loss) -> Iterator[Bucket]:
        self.layout.activate()
        self.work.backward(minibatch, loss)
        yield from self.work.gradients()

    def export_weights(self, form: Literal["merged", "adapter"] = "merged") -> Iterator[Bucket]:
        self.layout.activate()
        return self.work.export_weights(form)

    @property
    def shares_module(self) -> bool:
        return self.work.whole_module() is not None

    def inference_module(self) -> AbstractContextManager[nn.Module]:
        module = self.work.whole_module()
        if module is not None:
            return nullcontext(module)
        raise BackendError(
            "backend megatron: the training network is divided over ranks, and rollout engines cannot generate with "
            "it. Set rollout.weights: own (or leave it at auto): the engine then holds a copy"
        )

    def save(self, directory: Path, *, optimizer: bool) -> None:
        self.layout.activate()
        from mmrl_mindspeed import checkpoints

        checkpoints.save(self, directory, optimizer=optimizer)

    def load(self, directory: Path, *, optimizer: bool) -> None:
        self.layout.activate()
        from mmrl_mindspeed import checkpoints

        checkpoints.load(self, directory, optimizer=optimizer)

    def offload(self) -> None:
        if self.options.offload and self.context.device.torch_device.type != "cpu":
            self._away.put_away(keep=self.work.resident(), drop=self.work.optimizer.gradient_buffers())
            self.context.device.empty_cache()

    def onload(self) -> None:
        self._away.bring_back()
