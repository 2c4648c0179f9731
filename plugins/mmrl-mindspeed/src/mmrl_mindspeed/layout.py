"""Which tensors a Megatron GPTModel has, what they are made of, and how they are divided. Imports no megatron.

Names carry the global layer index, so that neither they nor the full tensors depend on tensor or pipeline parallelism.
The fused query-key-value projection has the rows of each key-value group together: its queries, its key, its value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmrl_core.errors import ModelError
from mmrl_mindspeed.architecture import Architecture

Kind = Literal["replicated", "column", "row", "qkv", "gate_up", "vocab"]
"""How ranks divide a full tensor: not at all; by rows; by columns; by rows, a whole number of key-value groups each; by
the rows of gate and of up, [gate_r; up_r] on rank r; by rows of the padded vocabulary."""


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One tensor of the GPTModel."""

    name: str
    """With the global layer index: `decoder.layers.7.self_attention.linear_qkv.weight`."""
    sources: tuple[str, ...]
    """The Hugging Face names it is made of: (q, k, v), (gate, up) or one."""
    kind: Kind
    layer: int | None
    """None: embedding, final norm, output layer."""
    stage: Literal["first", "last", None]
    """The pipeline stage that has it, for those of no layer."""


def weights(arch: Architecture, *, pipeline_parallel: int) -> list[Weight]:
    """Every tensor in the order of the stages.

    A tied output layer is the embedding itself on one stage (and no entry), and a copy on the last of several stages.
    """
    embed = "model.embed_tokens.weight"
    found = [_outside("embedding.word_embeddings.weight", embed, "vocab", "first")]
    for layer in range(arch.layers):
        found += _layer(arch, layer)
    found.append(_outside("decoder.final_layernorm.weight", "model.norm.weight", "replicated", "last"))
    if not arch.tied:
        found.append(_outside("output_layer.weight", "lm_head.weight", "vocab", "last"))
    elif pipeline_parallel > 1:
        found.append(_outside("output_layer.weight", embed, "vocab", "last"))
    return found


def _outside(name: str, source: str, kind: Kind, stage: Literal["first", "last"]) -> Weight:
    return Weight(name=name, sources=(source,), kind=kind, layer=None, stage=stage)


def _layer(arch: Architecture, layer: int) -> list[Weight]:
    attention = {"weight": True, "bias": arch.qkv_bias}
    rows: list[tuple[str, tuple[str, ...], Kind]] = [
        ("input_layernorm.weight", ("input_layernorm.weight",), "replicated"),
        *(
            (f"self_attention.linear_qkv.{leaf}", tuple(f"self_attn.{x}_proj.{leaf}" for x in "qkv"), "qkv")
            for leaf, present in attention.items()
            if present
        ),
        *(
            (f"self_attention.{x}_layernorm.weight", (f"self_attn.{x}_norm.weight",), "replicated")
            for x in ("q", "k")
            if arch.qk_norm
        ),
        ("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), "row"),
        ("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",), "replicated"),
        ("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), "gate_up"),
        ("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), "row"),
    ]
    ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
    return [
        Weight(name=ours + name, sources=tuple(theirs + s for s in sources), kind=kind, layer=layer, stage=None)
        for name, sources, kind in rows
    ]


# ------------------------------------------------------------------------------------------------------------- shapes


def source_shape(name: str, arch: Architecture) -> tuple[int, ...]:
    """The shape of the Hugging Face tensor `name`."""
    queries, keys = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "gate_proj": arch.ffn, "up_proj": arch.ffn}
    module, _, leaf = name.rpartition(".")
    module = module.rpartition(".")[2]
    if module in rows:
        return (rows[module],) if leaf == "bias" else (rows[module], arch.hidden)
    if module in ("q_norm", "k_norm"):
        return (arch.head_dim,)
    if module in ("embed_tokens", "lm_head"):
        return (arch.vocab, arch.hidden)
    others = {"o_proj": (arch.hidden, queries), "down_proj": (arch.hidden, arch.ffn)}
    return others.get(module, (arch.hidden,))


def full_shape(weight: Weight, arch: Architecture) -> tuple[int, ...]:
    """The shape of the undivided tensor, without vocabulary padding."""
    shapes = [source_shape(name, arch) for name in weight.sources]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def shard_shape(weight: Weight, arch: Architecture, tensor_parallel: int, *, padded_vocab: int) -> tuple[int, ...]:
    """The shape on each rank."""
    shape = list(full_shape(weight, arch))
    if weight.kind == "vocab":
        shape[0] = padded_vocab
    if weight.kind != "replicated":
        shape[1 if weight.kind == "row" else 0] //= tensor_parallel
    return tuple(shape)


def padded_vocabulary(vocab: int, tensor_parallel: int, multiple: int = 1) -> int:
    """The least multiple of `tensor_parallel * multiple` (Megatron's `make-vocab-size-divisible-by`) that holds it."""
    step = tensor_parallel * multiple
    return -(-vocab // step) * step


# --------------------------------------------------------------------------------------- Hugging Face <-> full tensor


def merge(weight: Weight, parts: Sequence[Tensor], arch: Architecture) -> Tensor:
    """The undivided tensor from those of `weight.sources`, in their order.

    `qkv`: q [heads * d, ...], k and v [kv_heads * d, ...] -> [(heads + 2 * kv_heads) * d, ...]. `gate_up`: two
    [ffn, hidden] -> [2 * ffn, hidden]. A single source is returned as it is.
    """
    assert len(parts) == len(weight.sources), weight.name
    if weight.kind == "qkv":
        grouped = [part.reshape(arch.kv_heads, -1, *part.shape[1:]) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 1)
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def split(weight: Weight, full: Tensor, arch: Architecture) -> list[Tensor]:
    """The tensors of `weight.sources`, bit for bit: the inverse of `merge`."""
    if weight.kind == "qkv":
        grouped = full.reshape(arch.kv_heads, -1, *full.shape[1:])
        rows = [arch.heads // arch.kv_heads * arch.head_dim, arch.head_dim, arch.head_dim]
        return [part.flatten(0, 1) for part in torch.split(grouped, rows, dim=1)]
    if weight.kind == "gate_up":
        return list(torch.split(full, arch.ffn))
    return [full]


# ----------------------------------------------------------------------------------------------- full tensor <-> ranks


def shard(weight: Weight, full: Tensor, rank: int, tensor_parallel: int, *, padded_vocab: int) -> Tensor:
    """The part of `full` that tensor-parallel rank `rank` holds: a view where its memory allows one.

    Rows of the vocabulary beyond the real ones are zero.
    """
    if weight.kind == "replicated":
        return full
    if weight.kind == "row":
        return _part(full, 1, rank, tensor_parallel)
    if weight.kind == "gate_up":
        return torch.cat([_part(half, 0, rank, tensor_parallel) for half in full.chunk(2)])
    if weight.kind == "vocab":
        rows, rest = divmod(padded_vocab, tensor_parallel)
        assert rest == 0, (padded_vocab, tensor_parallel)
        assert padded_vocab >= full.shape[0], (padded_vocab, full.shape)
        part = full[rank * rows : (rank + 1) * rows]
        missing = rows - part.shape[0]
        return torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part
    return _part(full, 0, rank, tensor_parallel)


def unshard(weight: Weight, shards: Sequence[Tensor], arch: Architecture) -> Tensor:
    """The undivided tensor from every rank's part, vocabulary padding dropped: the inverse of `shard`."""
    if weight.kind == "replicated":
        return shards[0]
    if weight.kind == "gate_up":
        halves = [part.chunk(2) for part in shards]
        return torch.cat([*(half[0] for half in halves), *(half[1] for half in halves)])
    full = shards[0] if len(shards) == 1 else torch.cat(list(shards), dim=1 if weight.kind == "row" else 0)
    return full[: arch.vocab] if weight.kind == "vocab" else full


def _part(full: Tensor, dim: int, rank: int, count: int) -> Tensor:
    size, rest = divmod(full.shape[dim], count)
    assert rest == 0, f"{tuple(full.shape)} does not divide by {count} along {dim}"
    return full.narrow(dim, rank * size, size)


# ------------------------------------------------------------------------------------------------------------- stages


def stage_layers(layers: int, pipeline_parallel: int, uneven: Sequence[int] | None) -> list[range]:
    """The layers of each pipeline stage: `uneven` says how many each has, None divides them evenly."""
    counts = list(uneven) if uneven is not None else [layers // pipeline_parallel] * pipeline_parallel
    assert (sum(counts), len(counts)) == (layers, pipeline_parallel), (layers, pipeline_parallel, uneven)
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]


def stage_of(weight: Weight, stages: Sequence[range]) -> int:
    """The pipeline stage that has a tensor."""
    if weight.layer is None:
        return 0 if weight.stage == "first" else len(stages) - 1
    return next(i for i, layers in enumerate(stages) if weight.layer in layers)


def check_layout(
    arch: Architecture, *, tensor_parallel: int, pipeline_parallel: int, uneven: Sequence[int] | None, where: str
) -> None:
    """Raise ModelError when heads, key-value groups, MLP rows or layers do not divide.

    Args:
        uneven: layers of each stage, or None.
        where: what asked for the layout, for the error.
    """
    for word, value in (("tensor_parallel", tensor_parallel), ("pipeline_parallel", pipeline_parallel)):
        if value < 1:
            raise ModelError(f"{where}: {word} = {value}; it is at least 1")
    divided = {
        "num_attention_heads": arch.heads,
        "num_key_value_heads": arch.kv_heads,
        "intermediate_size": arch.ffn,
    }
    for field, value in divided.items():
        if value % tensor_parallel:
            allowed = [n for n in range(1, value + 1) if all(v % n == 0 for v in divided.values())]
            raise ModelError(
                f"{where}: tensor_parallel = {tensor_parallel} does not divide the model's {field} = {value}. "
                f"Possible here: {', '.join(map(str, allowed))}"
            )
    if uneven is None:
        if arch.layers % pipeline_parallel:
            raise ModelError(
                f"{where}: pipeline_parallel = {pipeline_parallel} does not divide the model's {arch.layers} layers. "
                "Choose another number, or say with layers_per_stage how many layers each stage has"
            )
    elif len(uneven) != pipeline_parallel or sum(uneven) != arch.layers or min(uneven) < 1:
        raise ModelError(
            f"{where}: layers_per_stage = {list(uneven)} must be {pipeline_parallel} numbers (pipeline_parallel), each "
            f"at least 1, that add up to the model's {arch.layers} layers"
        )
