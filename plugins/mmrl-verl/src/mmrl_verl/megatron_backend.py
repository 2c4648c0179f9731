"""`VerlMegatronBackend` and `VerlMindSpeedBackend`: the contract between mmrl and verl's Megatron engine."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmrl_core.backends.optimizer import UpdateGuard
from mmrl_core.backends.weight_stream import BUCKET_BYTES
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
from mmrl_core.errors import BackendError
from mmrl_verl.building import Plan, quietly
from mmrl_verl.engine_backend import VerlEngineBackend
from mmrl_verl.megatron_engine import build

if TYPE_CHECKING:
    from mmrl_verl.megatron_options import VerlMegatronOptions

T = TypeVar("T")


class VerlMegatronBackend(VerlEngineBackend):
    """Training with the engine that verl registers as `megatron`: its model, layout, forward, backward and optimizer;
    the recipe's loss, schedule and guard. A replica is a block of tensor-parallel x pipeline-parallel ranks."""

    name = "verl-megatron"
    precisions = ("bfloat16",)
    device: ClassVar[str] = "cuda"
    """The only one it runs on."""
    options: VerlMegatronOptions

    def setup(self, context: RunContext, policy: Policy, training: TrainingSpec) -> None:
        self.context, self.training = context, training
        if context.device.name != self.device:
            raise BackendError(
                f"backend {self.name} runs on the device {self.device}, and the recipe's is {context.device.name}; "
                "use backend: verl-fsdp2, or megatron of the plugin mmrl-mindspeed"
            )
        self.policy = self._supported(policy, context)
        self.engine = build(self._plan(trained=True), self.name)
        self.optimizer = UpdateGuard(training.optimizer, training.total_updates)
        self.reference_engine = build(self._plan(trained=False), self.name) if training.reference else None

    def _plan(self, *, trained: bool) -> Plan[VerlMegatronOptions]:
        return Plan(
            context=self.context, policy=self.policy, training=self.training, options=self.options, trained=trained
        )

    @property
    def replica(self) -> Replica:
        from megatron.core import parallel_state

        first = parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.is_pipeline_first_stage()
        engine = self.engine
        return Replica(index=engine.get_data_parallel_rank(), count=engine.get_data_parallel_size(), is_root=first)

    def reference(self, rollouts: Rollouts) -> Record:
        assert self.reference_engine is not None, "no reference was asked for at set-up"
        return {"log_probs": list(self._infer(self.reference_engine, rollouts, entropy=False).log_probs)}

    def _everywhere(self, value: T | None) -> T:
        from megatron.core import parallel_state

        if parallel_state.get_pipeline_model_parallel_world_size() == 1:
            return super()._everywhere(value)
        box = [value]
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast_object_list(box, src=last, group=parallel_state.get_pipeline_model_parallel_group())
        return super()._everywhere(box[0])

    # -------------------------------------------------------------------------------------------------------- training

    def _step(self) -> tuple[float, bool]:
        megatron = self.engine.optimizer
        # verl's step would put a gradient that is not finite into the weights: look at it first
        megatron.prepare_grads()
        norms = self.context.world.gather(float(megatron.get_grad_norm()))
        norm = next((n for n in norms if not math.isfinite(n)), norms[0])
        applied = self.optimizer.admits(norm)
        if applied:
            for group in megatron.param_groups:
                group["lr"] = self.optimizer.last_lr
                # 0 for parameters of one dimension
                group["weight_decay"] = self.training.optimizer.weight_decay * group["wd_mult"]
            self.engine.optimizer_step()
        self._zero_grad()
        return norm, applied

    def _zero_grad(self) -> None:
        self.engine.optimizer_zero_grad()

    def gradients(self, minibatch: Minibatch, loss: Loss) -> Iterator[Bucket]:
        """As every backend's. They leave by the way of the weights, standing in their places while they do."""
        self._backward(minibatch, loss)
        with self._gradients_as_weights():
            yield from self._exported()
        self._zero_grad()

    @contextmanager
    def _gradients_as_weights(self) -> Iterator[None]:
        parameters = [p for chunk in self.engine.module for p in chunk.parameters()]
        weights = [parameter.data for parameter in parameters]
        if self.options.distributed_optimizer:
            self._gather_gradients()
        try:
            for parameter in parameters:
                parameter.data = parameter.main_grad
            yield
        finally:
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.data = weight

    def _gather_gradients(self) -> None:
        """Give every replica the whole sum: the distributed optimizer leaves each its own part. Collective."""
        group, count = self.engine.get_data_parallel_group(), self.engine.get_data_parallel_size()
        rank = self.engine.get_data_parallel_rank()
        buckets = (b for chunk in self.engine.module for groups in chunk.bucket_groups for b in groups.buckets)
        for bucket in buckets if count > 1 else ():
            own = bucket.grad_data.chunk(count)[rank].clone()
            dist.all_gather_into_tensor(bucket.grad_data, own, group=group)

    # --------------------------------------------------------------------------------------------------------- weights

    @torch.no_grad()
    def export_weights(self, form: Literal["merged", "adapter"] = "merged") -> Iterator[Bucket]:
        assert form == "merged", "without model.lora there are no adapters"
        yield from self._exported()

    def _exported(self) -> Iterator[Bucket]:
        """What verl's engine exports, in buckets; tied weights once. Collective."""
        tensors: Iterable[tuple[str, Tensor]] = self.engine.get_per_tensor_param()[0]
        seen: set[str] = set()
        bucket: list[tuple[str, Tensor]] = []
        size = 0
        for name, tensor in tensors:
            if name in seen:
                continue
            seen.add(name)
            bucket.append((name, tensor.detach()))
            size += tensor.numel() * tensor.element_size()
            if size >= BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket

    @property
    def shares_module(self) -> bool:
        return False

    def inference_module(self) -> AbstractContextManager[nn.Module]:
        raise BackendError(
            f"backend {self.name}: Megatron's modules do not generate; the rollout needs its own weights"
        )

    def save(self, directory: Path, *, optimizer: bool) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._manager(optimizer=optimizer)
        with quietly():
            self.engine.save_checkpoint(local_path=str(directory))
        if self.context.world.is_main:
            facts = {"updates": self.optimizer.updates, "skipped": self.optimizer.skipped, "optimizer": optimizer}
            self._facts(directory).write_text(json.dumps(facts), encoding="utf-8")

    def load(self, directory: Path, *, optimizer: bool) -> None:
        marker = self._facts(directory)
        if not marker.is_file():
            raise BackendError(
                f"{directory}: the backend {self.name} did not write this checkpoint ({marker.name} is missing). To "
                "start from the weights of another backend, use another run_dir and model.path"
            )
        facts = json.loads(marker.read_text(encoding="utf-8"))
        if optimizer and not facts["optimizer"]:
            raise BackendError(
                f"{directory}: this checkpoint holds no optimizer (it was written with checkpoint.save_optimizer: "
                "false). To go on with a fresh optimizer set checkpoint.load_optimizer: false"
            )
        self._manager(optimizer=optimizer)
        with quietly():
            self.engine.load_checkpoint(local_path=str(directory), del_local_after_load=False)
        if optimizer:
            self.optimizer.updates, self.optimizer.skipped = facts["updates"], facts["skipped"]
        else:
            # else its fp32 weights, of before, would come back with the next update
            self.engine.optimizer.reload_model_params()

    def _manager(self, *, optimizer: bool) -> None:
        """Tell verl's checkpoint manager what is wanted; random states are not (there is no dropout)."""
        manager: Any = self.engine.checkpoint_mananager
        contents = ["model", "optimizer"] if optimizer else ["model"]
        manager.checkpoint_save_contents = manager.checkpoint_load_contents = contents

    def _facts(self, directory: Path) -> Path:
        return directory / f"{self.name}.json"


class VerlMindSpeedBackend(VerlMegatronBackend):
    """The same with the engine that verl registers as `megatron` on Ascend, which MindSpeed adapts Megatron for."""

    name = "verl-mindspeed"
    device = "npu"
