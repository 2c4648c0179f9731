"""Megatron's optimizer as the recipe's optimizer section means it: AdamW, schedule, clipping, non-finite guard."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from mmrl_core.backends.optimizer import UpdateGuard
from mmrl_core.world import World

if TYPE_CHECKING:
    from mmrl_core.recipe import OptimizerSpec


MOMENTS = ("exp_avg", "exp_avg_sq")


def data_parallel(module: nn.Module, config: Any, *, distributed_optimizer: bool) -> DistributedDataParallel:
    """Megatron's DDP around `module`: gradients add up in fp32 `main_grad`s and are summed over replicas, without a
    division (`config.calculate_per_token_loss`)."""
    assert config.calculate_per_token_loss, "gradients would be averaged over replicas"
    ddp = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=False,
            average_in_collective=False,
            use_distributed_optimizer=distributed_optimizer,
        ),
        module,
    )
    return ddp


@dataclass(frozen=True, kw_only=True)
class MainValues:
    """This rank's part of the fp32 values behind a parameter."""

    values: Tensor
    start: int
    """Where they begin in the flattened parameter."""
    divided: bool
    """Whether replicas hold different parts, or all of them everything."""
    moments: Mapping[str, Tensor]
    """AdamW's, by name, of the same elements; none before the first update."""

    def copy_(self, whole: Tensor) -> None:
        """Take the values from the whole parameter's."""
        flat = whole.reshape(-1)[self.start : self.start + self.values.numel()]
        self.values.detach().view(-1).copy_(flat)


class MegatronAdamW(UpdateGuard):
    """AdamW of megatron-core on a DDP-wrapped module, with fp32 main parameters."""

    def __init__(
        self, ddp: DistributedDataParallel, spec: OptimizerSpec, total_updates: int, world: World, dtype: torch.dtype
    ) -> None:
        super().__init__(spec, total_updates)
        self.ddp = ddp
        self.world = world
        self.megatron = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=spec.lr,
                weight_decay=spec.weight_decay,
                adam_beta1=spec.betas[0],
                adam_beta2=spec.betas[1],
                adam_eps=spec.eps,
                clip_grad=0.0,  # done here, with the norm that the world has agreed on
                bf16=dtype == torch.bfloat16,
                params_dtype=dtype,
                use_distributed_optimizer=ddp.ddp_config.use_distributed_optimizer,
            ),
            [ddp],
            use_gloo_process_groups=False,
        )

    def zero_grad(self) -> None:
        """Begin a new sum of gradients."""
        self.ddp.zero_grad_buffer()
        self.megatron.zero_grad()

    def sum_gradients(self) -> None:
        """Sum gradients over replicas, over the ranks of sequence parallelism and over both ends of a tied embedding.
        With the distributed optimizer each rank has the sum for its own part only. Collective."""
        finalize_model_grads([self.ddp])

    def main_values(self, parameter: nn.Parameter) -> MainValues | None:
        """The fp32 values that are trained for `parameter`, or None when other replicas hold all of them."""
        for part in self.parts:
            places = getattr(part, "model_param_group_index_map", None)
            start = 0
            if places is not None:  # a distributed optimizer
                if parameter not in places:
                    continue
                group, position = places[parameter]
                values = part.optimizer.param_groups[group]["params"][position]
                start = part._get_model_param_range_map(parameter)["param"].start
            else:
                values = getattr(parameter, "main_param", None)
                values = parameter if values is None else values
                if not any(values is p for group in part.optimizer.param_groups for p in group["params"]):
                    continue
            state = part.optimizer.state.get(values, {})
            moments = {name: state[name] for name in MOMENTS if name in state}
            return MainValues(values=values, start=start, divided=places is not None, moments=moments)
        return None

    @property
    def parts(self) -> list[Any]:
        """The optimizers that do the work; Megatron chains them when there are several."""
        return list(getattr(self.megatron, "chained_optimizers", [self.megatron]))

    def use_main_values(self) -> None:
        """Set the weights of forward and backward from the fp32 values. Collective."""
        for part in self.parts:
            if not getattr(part, "is_stub_optimizer", False) and hasattr(part, "_copy_main_params_to_model_params"):
                part._copy_main_params_to_model_params()
        if self.ddp.ddp_config.use_distributed_optimizer:
            self.ddp.start_param_sync()

    def steps_taken(self) -> int:
        """How many updates AdamW has applied; 0 on a rank that holds nothing."""
        for part in self.parts:
            for state in part.optimizer.state.values():
                if "step" in state:
                    return int(state["step"])
            for group in part.optimizer.param_groups:
                if group["params"] and "step" in group:
                    return int(group["step"])
        return 0

    def create_moments(self, steps: int) -> None:
        """Make AdamW's state, as it would itself in its first step. torch's counts steps in the state of each
        parameter, fused ones in a group."""
        for part in self.parts:
            counts_each = type(part.optimizer).__module__.startswith("torch.optim")
            for group in part.optimizer.param_groups:
                if not counts_each:
                    group["step"] = steps
                for parameter in group["params"]:
                    state = part.optimizer.state[parameter]
                    for name in MOMENTS:
                        if name not in state:
                            state[name] = torch.zeros_like(parameter, dtype=torch.float32)
                    if counts_each:
                        state["step"] = torch.tensor(float(steps))

    def resident(self) -> Iterator[Tensor]:
        """Every tensor of the optimizer's own but gradients, for offloading."""
        for part in self.parts:
            for group in part.optimizer.param_groups:
                yield from group["params"]
            for state in part.optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor) and value.ndim > 0)

    def gradient_buffers(self) -> Iterator[Tensor]:
        """The fp32 sums of gradients: zero between updates."""
        for group in self.ddp.bucket_groups:
            yield from (bucket.grad_data for bucket in group.buckets)

    def gather_gradients(self, data_group: ProcessGroup) -> None:
        """Give every replica the whole sum, for looking at: with the distributed optimizer each has the sum for its
        own part of a bucket only. Collective."""
        count, rank = dist.get_world_size(data_group), dist.get_rank(data_group)
        if count == 1 or not self.ddp.ddp_config.use_distributed_optimizer:
            return
        for group in self.ddp.bucket_groups:
            for bucket in group.buckets:
                own = bucket.grad_data.chunk(count)[rank].clone()
                dist.all_gather_into_tensor(bucket.grad_data, own, group=data_group)

    def step(self) -> tuple[float, bool]:
        """Clip and update, or skip when the gradient is not finite on any rank. Collective.

        Returns (L2 norm before clipping, the same on every rank; whether it updated). Raises BackendError after too
        many skips in a row.
        """
        self.megatron.prepare_grads()
        norm = _agreed(float(self.megatron.get_grad_norm()), self.world)
        if not self.admits(norm):
            self.zero_grad()
            return norm, False
        if self.spec.clip_grad is not None:
            torch.nn.utils.clip_grads_with_norm_(
                self.megatron.get_parameters(), self.spec.clip_grad, torch.tensor(norm)
            )
        for group in self.megatron.param_groups:
            group["lr"] = self.last_lr
            # 0 for parameters of one dimension
            group["weight_decay"] = self.spec.weight_decay * group["wd_mult"]
        self.megatron.step_with_ready_grads()
        self.zero_grad()
        return norm, True


def _agreed(norm: float, world: World) -> float:
    """One norm for all ranks: that of rank 0, or one that is not finite when any rank has such a one."""
    norms = world.gather(norm)
    return next((n for n in norms if not math.isfinite(n)), norms[0])
