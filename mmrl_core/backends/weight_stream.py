"""Streaming full weights out of a (possibly sharded) module, adapters merged or alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmrl_core.contracts import Bucket, Policy

BUCKET_BYTES = 256 << 20


def full(tensor: Tensor) -> Tensor:
    """The whole tensor of a shard, detached. Collective for sharded tensors."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def export(module: nn.Module, policy: Policy, form: Literal["merged", "adapter"]) -> Iterator[Bucket]:
    """Buckets of (Hugging Face name, full tensor); tied weights once. At most one bucket and one tensor are alive.

    `merged`: LoRA layers as W + scaling * B A, computed in fp32. `adapter`: the adapters' own tensors only.
    """
    layers = {name: child for name, child in module.named_modules() if hasattr(child, "lora_A")}
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, parameter in module.named_parameters():
        if ("lora_" in name) != (form == "adapter"):
            continue
        tensor = full(parameter)
        owner, _, leaf = name.rpartition(".base_layer.")
        if form == "merged" and leaf == "weight" and owner in layers:
            tensor = tensor + _delta(layers[owner])
        bucket.append((policy.weight_name(name), tensor))
        size += tensor.numel() * tensor.element_size()
        if size >= BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def _delta(layer: Any) -> Tensor:
    """scaling * B A of a peft LoRA layer. Collective for sharded tensors."""
    parts = [
        layer.scaling[adapter]
        * (full(layer.lora_B[adapter].weight).float() @ full(layer.lora_A[adapter].weight).float())
        for adapter in layer.active_adapters
    ]
    return torch.stack(parts).sum(0)
