"""A differentiable KV cache: a group's prompt is computed once, with gradient, and seen by all its responses.

Two objects, so that activation checkpointing may run each forward again during backward: the prompt pass *records*
keys and values (recording again is idempotent), the response pass *reads* the recorded ones, repeated by row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class _Recorder(DynamicLayer):  # type: ignore[misc]
    """Keeps the keys and values of the prompt pass; looks empty to the mask code."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.recorded = (key_states, value_states)
        return key_states, value_states


class _Reader(DynamicLayer):  # type: ignore[misc]
    """Prepends fixed keys and values [rows, heads, prompt, head_dim]; stores nothing."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


class PromptRecorder(Cache):  # type: ignore[misc]
    """Pass as `past_key_values` to the prompt pass."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[_Recorder() for _ in range(layers)])

    def for_rows(self, prompt_of_row: Tensor) -> Cache:
        """The cache of the response pass: row i sees the prompt `prompt_of_row[i]` ([rows] int64, ascending)."""
        repeated = repeater(prompt_of_row, len(self.layers[0].recorded[0]))
        return Cache(layers=[_Reader(*(repeated(recorded) for recorded in layer.recorded)) for layer in self.layers])


def repeater(prompt_of_row: Tensor, prompts: int) -> Callable[[Tensor], Tensor]:
    """Tensors [prompts, ...] -> [rows, ...]: row i gets that of prompt `prompt_of_row[i]` ([rows] int64, ascending)."""
    present, counts = torch.unique_consecutive(prompt_of_row, return_counts=True)
    if len(present) == prompts and bool((counts == counts[0]).all()):
        group = int(counts[0])
        # its backward is a plain sum over the group, deterministic on every device
        return lambda tensor: tensor.repeat_interleave(group, dim=0) if group > 1 else tensor
    return lambda tensor: tensor.index_select(0, prompt_of_row.to(tensor.device))
