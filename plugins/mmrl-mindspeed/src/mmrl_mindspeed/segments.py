"""Where a rank's part of a parameter lies in the Hugging Face tensors it is made of. Imports no megatron.

A parameter on a rank is a stack of *segments*: rows that are one rectangle of one Hugging Face tensor. A distributed
optimizer holds a range [start, stop) of the flattened parameter, which cuts segments into *boxes*. Boxes are what a
checkpoint stores and asks for, so nothing in it depends on how ranks divide the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmrl_mindspeed.architecture import Architecture
from mmrl_mindspeed.layout import Weight, source_shape


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Consecutive rows of a local parameter that are one rectangle of one tensor."""

    name: str
    """Of the tensor."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offsets: tuple[int, ...]
    """Where the rectangle begins in it."""
    rows: range
    """The rows of the local parameter; its other dimensions are the rectangle's."""


@dataclass(frozen=True, kw_only=True)
class Box:
    """A rectangle of one tensor, and the memory of this rank that holds it."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offsets: tuple[int, ...]
    memory: Tensor
    """Of the rectangle's size: a view, which loading writes to."""


def segments(weight: Weight, arch: Architecture, rank: int, tensor_parallel: int) -> list[Segment]:
    """The segments of tensor-parallel rank `rank`'s part of `weight`. Rows that pad the vocabulary are in none."""
    shapes = [source_shape(name, arch) for name in weight.sources]
    if weight.kind == "replicated":
        return [_rows(weight.sources[0], shapes[0], 0, range(shapes[0][0]))]
    if weight.kind == "row":
        columns = shapes[0][1] // tensor_parallel
        origin = (0, rank * columns)
        return [Segment(name=weight.sources[0], shape=shapes[0], offsets=origin, rows=range(shapes[0][0]))]
    if weight.kind == "vocab":
        count = -(-arch.vocab // tensor_parallel)
        real = max(0, min(arch.vocab - rank * count, count))
        return [_rows(weight.sources[0], shapes[0], rank * count, range(real))] if real else []
    if weight.kind == "qkv":
        return _interleaved(weight.sources, shapes, arch.kv_heads, rank, tensor_parallel)
    found, start = [], 0
    for name, shape in zip(weight.sources, shapes, strict=True):
        count = shape[0] // tensor_parallel
        found.append(_rows(name, shape, rank * count, range(start, start + count)))
        start += count
    return found


def _interleaved(
    names: Sequence[str], shapes: Sequence[tuple[int, ...]], groups: int, rank: int, tensor_parallel: int
) -> list[Segment]:
    """Query, key and value rows of each key-value group, one group after the other."""
    own = groups // tensor_parallel
    found, start = [], 0
    for group in range(rank * own, (rank + 1) * own):
        for name, shape in zip(names, shapes, strict=True):
            count = shape[0] // groups
            found.append(_rows(name, shape, group * count, range(start, start + count)))
            start += count
    return found


def _rows(name: str, shape: tuple[int, ...], first: int, rows: range) -> Segment:
    return Segment(name=name, shape=shape, offsets=(first, *[0] * (len(shape) - 1)), rows=rows)


def whole(name: str, shape: torch.Size) -> list[Segment]:
    """The segment of a parameter that is one tensor and that ranks do not divide."""
    size = tuple(shape) or (1,)
    return [_rows(name, size, 0, range(size[0]))]


def boxes(parts: Sequence[Segment], shape: torch.Size, flat: Tensor, start: int) -> Iterator[Box]:
    """The boxes that a range of a local parameter of `shape` holds; `flat` [n] is the range's memory, from the
    flattened parameter's element `start` on."""
    inner = math.prod(shape[1:])
    for part in parts:
        size = (len(part.rows), *shape[1:])
        first, last = part.rows.start * inner, part.rows.stop * inner
        low, high = max(first, start), min(last, start + flat.numel())
        if low >= high:
            continue
        for corner, extent, position in _rectangles(size, low - first, high - first):
            begin = first + position - start
            yield Box(
                name=part.name,
                shape=part.shape,
                offsets=tuple(a + b for a, b in zip(part.offsets, corner, strict=True)),
                memory=flat[begin : begin + math.prod(extent)].view(extent),
            )


def _rectangles(
    shape: tuple[int, ...], start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """(corner, extent, first element) of the rectangles that make up elements [start, stop) of a flattened tensor."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,), start
        return
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), stop // inner
    if first > last:  # within one row
        yield from _in_row(shape, first - 1, start, stop)
        return
    yield from _in_row(shape, first - 1, start, first * inner)
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:]), first * inner
    yield from _in_row(shape, last, last * inner, stop)


def _in_row(
    shape: tuple[int, ...], row: int, start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    base = row * math.prod(shape[1:])
    for corner, extent, position in _rectangles(shape[1:], start - base, stop - base):
        yield (row, *corner), (1, *extent), base + position
