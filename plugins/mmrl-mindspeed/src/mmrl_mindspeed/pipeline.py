"""Running micro-batches through the stages with Megatron's schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from mmrl_mindspeed.parallel import Layout
from mmrl_mindspeed.rows import TokenRows

T = TypeVar("T")


def forward(
    module: nn.Module, parts: Sequence[TokenRows], finish: Callable[[int, Tensor], T], layout: Layout
) -> list[T]:
    """Forward passes only; `finish(index, hidden)` for each part, on the last stage. Elsewhere the list is empty."""

    def done(index: int, hidden: Tensor, *, non_loss_data: bool) -> T:
        return finish(index, hidden)

    with torch.no_grad():
        results: list[T] = _run(module, parts, done, forward_only=True, collect_non_loss_data=True)
    return results if layout.last else []


def forward_backward(module: nn.Module, parts: Sequence[TokenRows], loss: Callable[[int, Tensor], Tensor]) -> None:
    """One forward, one backward (1F1B) over the stages. `loss(index, hidden)` is called on the last stage; gradients
    of the sum of the losses add up in the parameters' `main_grad`, and nothing is divided."""

    def done(index: int, hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        # of the three, Megatron divides none when calculate_per_token_loss is set; the count it only adds up
        return loss(index, hidden), torch.ones((), dtype=torch.int, device=hidden.device), {}

    _run(module, parts, done, forward_only=False)


def _run(module: nn.Module, parts: Sequence[TokenRows], done: Callable[..., Any], **arguments: Any) -> Any:
    def step(batches: Iterator[tuple[int, TokenRows]], model: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        index, part = next(batches)
        hidden = model(input_ids=part.ids, position_ids=None, attention_mask=None)
        return hidden, partial(done, index)

    rows, length = parts[0].ids.shape
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(enumerate(parts)),
        model=[module],
        num_microbatches=len(parts),
        seq_length=length,
        micro_batch_size=rows,
        **arguments,
    )


def from_last_stage(tensor: Tensor, layout: Layout) -> Tensor:
    """The last stage's values in `tensor`, in place. Collective over the pipeline."""
    if layout.pipeline > 1:
        dist.broadcast(tensor, src=layout.stage_rank(layout.pipeline - 1), group=layout.pipeline_group)
    return tensor


def object_from_last_stage(value: T, layout: Layout) -> T:
    """The last stage's value, pickled between our own ranks. Collective over the pipeline."""
    if layout.pipeline == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=layout.stage_rank(layout.pipeline - 1), group=layout.pipeline_group)
    result: T = box[0]
    return result
