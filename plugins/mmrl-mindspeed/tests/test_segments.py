"""Boxes of parameters against the tensors they are parts of, for every layout and every cut, without Megatron."""

from __future__ import annotations

import itertools

import pytest
import torch
from mmrl_mindspeed.architecture import Architecture
from mmrl_mindspeed.layout import merge, padded_vocabulary, shard, source_shape, weights
from mmrl_mindspeed.segments import boxes, segments, whole
from torch import Tensor

ARCH = Architecture(
    family="qwen2",
    layers=1,
    hidden=6,
    heads=4,
    kv_heads=2,
    head_dim=3,
    ffn=8,
    vocab=11,
    tied=False,
    qkv_bias=True,
    qk_norm=True,
    norm_eps=1e-6,
    rope_theta=1e4,
    rope_scaling=None,
    max_positions=64,
)


def cuts(size: int, parts: int) -> list[tuple[int, int]]:
    """Uneven consecutive ranges, as a distributed optimizer makes them."""
    edges = sorted({0, size, *(min(size, 1 + i * size // parts + i) for i in range(1, parts))})
    return list(itertools.pairwise(edges))


@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_boxes_put_every_shard_where_it_came_from(tensor_parallel: int, parts: int) -> None:
    """Every element of every Hugging Face tensor is in exactly one box, at its place."""
    made: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    count = itertools.count(1)
    for weight in weights(ARCH, pipeline_parallel=1):
        for name in weight.sources:
            shape = source_shape(name, ARCH)
            made[name] = torch.tensor([float(next(count)) for _ in range(torch.Size(shape).numel())]).view(shape)
            seen[name] = torch.zeros(shape)
        full = merge(weight, [made[name] for name in weight.sources], ARCH)
        padded = padded_vocabulary(ARCH.vocab, tensor_parallel)
        for rank in range(1 if weight.kind == "replicated" else tensor_parallel):
            part = shard(weight, full, rank, tensor_parallel, padded_vocab=padded).contiguous()
            for start, stop in cuts(part.numel(), parts):
                flat = part.view(-1)[start:stop]
                for box in boxes(segments(weight, ARCH, rank, tensor_parallel), part.shape, flat, start):
                    assert box.shape == tuple(made[box.name].shape)
                    place = tuple(slice(o, o + n) for o, n in zip(box.offsets, box.memory.shape, strict=True))
                    assert torch.equal(seen[box.name][place], torch.zeros(box.memory.shape)), "held twice"
                    seen[box.name][place] = box.memory
    assert all(torch.equal(seen[name], made[name]) for name in made)


@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (2, 3, 2, 2), (1, 1, 5)])
def test_any_range_of_any_shape(shape: tuple[int, ...]) -> None:
    tensor = torch.arange(1.0, torch.Size(shape).numel() + 1).view(shape)
    size = tensor.numel()
    for start in range(size):
        for stop in range(start + 1, size + 1):
            rebuilt = torch.zeros(shape or (1,))
            flat = tensor.reshape(-1)[start:stop]
            for box in boxes(whole("x", tensor.shape), tensor.shape, flat, start):
                place = tuple(slice(o, o + n) for o, n in zip(box.offsets, box.memory.shape, strict=True))
                rebuilt[place] = box.memory
            assert torch.equal(rebuilt.view(-1)[start:stop], flat)
            assert int(rebuilt.ne(0).sum()) == stop - start


def test_loading_writes_into_the_parameter() -> None:
    memory = torch.zeros(2, 3)
    (box,) = boxes(whole("x", memory.shape), memory.shape, memory.view(-1)[3:], 3)
    box.memory.fill_(1.0)
    assert memory.tolist() == [[0, 0, 0], [1, 1, 1]]
