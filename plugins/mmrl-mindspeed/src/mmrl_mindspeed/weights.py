"""Weights and gradients between Hugging Face tensors and this rank's shards, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmrl_core.contracts import Bucket
from mmrl_core.errors import ModelError
from mmrl_mindspeed import layout as naming
from mmrl_mindspeed.architecture import Architecture
from mmrl_mindspeed.layout import Weight, full_shape, merge, padded_vocabulary, shard, split, stage_of, unshard
from mmrl_mindspeed.model import named_shards
from mmrl_mindspeed.parallel import Layout

BUCKET_BYTES = 256 << 20


@torch.no_grad()
def load(
    stage: nn.Module,
    read: Callable[[str], Tensor],
    arch: Architecture,
    layout: Layout,
    stages: Sequence[range],
    put: Callable[[nn.Parameter, Tensor], object],
) -> None:
    """Make this rank's shards from Hugging Face tensors, which are read one fused weight at a time.

    Args:
        read: the tensor of a Hugging Face name.
        put: what to do with a parameter and its shard, which is in the precision that it is stored in.
    """
    padded = padded_vocabulary(arch.vocab, layout.tensor)
    for weight, parameter in named_shards(stage, arch, layout, stages):
        parts = [read(name) for name in weight.sources]
        part = shard(weight, merge(weight, parts, arch), layout.tensor_rank, layout.tensor, padded_vocab=padded)
        put(parameter, part)


@torch.no_grad()
def stream(
    stage: nn.Module,
    value: Callable[[nn.Parameter], Tensor],
    arch: Architecture,
    layout: Layout,
    stages: Sequence[range],
) -> Iterator[Bucket]:
    """Buckets of (Hugging Face name, full tensor) of `value(parameter)`; tied weights once. Every rank must exhaust
    it. Alive at a time: one bucket, and one fused weight with its shards."""
    own = {weight.name: parameter for weight, parameter in named_shards(stage, arch, layout, stages)}
    dtype = value(next(iter(own.values()))).dtype
    device = next(stage.parameters()).device
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for weight in naming.weights(arch, pipeline_parallel=layout.pipeline):
        if weight.name == "output_layer.weight" and arch.tied:
            continue  # the last stage's copy of the embedding
        parameter = own.get(weight.name)
        if parameter is not None:
            full = unshard(weight, _gathered(weight, value(parameter).detach(), layout), arch)
        else:
            full = torch.empty(full_shape(weight, arch), dtype=dtype, device=device)
        if layout.pipeline > 1:
            full = full.contiguous()
            dist.broadcast(full, src=layout.stage_rank(stage_of(weight, stages)), group=layout.pipeline_group)
        bucket += zip(weight.sources, split(weight, full, arch), strict=True)
        size += full.numel() * full.element_size()
        del full
        if size >= BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def _gathered(weight: Weight, part: Tensor, layout: Layout) -> list[Tensor]:
    """Every tensor-parallel rank's part of a weight."""
    if layout.tensor == 1 or weight.kind == "replicated":
        return [part]
    parts = [torch.empty_like(part) for _ in range(layout.tensor)]
    dist.all_gather(parts, part.contiguous(), group=layout.tensor_group)
    return parts


def local_folder(path: str) -> Path:
    """The folder of a model: itself, or a hub id's files, fetched when they are not in the cache. Raises ModelError."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ModelError(
            f"model.path {path!r}: no such folder; for a hub id the hub must be reachable (HF_HUB_OFFLINE unset)\n"
            f"{error}"
        ) from error
