"""Weights as Megatron stores them: one file a rank, layers counted from 0 in each pipeline stage."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmrl_core.checkpoint.dcp_reading import DcpSource
from mmrl_core.checkpoint.model_files import copy_model_files, model_files_in, read_config
from mmrl_core.contracts import WeightFormat, WeightSource
from mmrl_core.errors import ModelError
from mmrl_mindspeed import layout
from mmrl_mindspeed.architecture import Architecture, architecture
from mmrl_mindspeed.format_options import McoreOptions
from mmrl_mindspeed.layout import Weight
from mmrl_mindspeed.mcore_args import check_args, checkpoint_args
from mmrl_mindspeed.rank_folders import (
    LATEST,
    RankFiles,
    first_file,
    iteration_folder,
    iteration_name,
    rank_folder,
    read_rank_files,
    save_rank_file,
)
from mmrl_mindspeed.torch_files import StoredTensor, read_torch_file
from mmrl_mindspeed.wan_names import is_wan

CHECKPOINT_VERSION = 3.0
"""Of the order of rows in the fused query-key-value projection, as Megatron counts it."""

SHOWN = 5
"""Names of one kind in an error."""

_FUSED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
"""What TransformerEngine calls the norms, which it fuses with the projection after them."""

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")

_IGNORED = re.compile(r".*(?:_extra_state|rotary_pos_emb\.inv_freq|rotary_emb\.inv_freq)")


class McoreFormat(WeightFormat):
    """`latest_checkpointed_iteration.txt`, `release/mp_rank_XX[_YYY]/model_optim_rng.pt`; config and tokenizer in
    `hf/`."""

    options: McoreOptions

    @classmethod
    def detect(cls, folder: Path) -> bool:
        file = first_file(folder)
        if file is None:
            return iteration_folder(folder) is not None and not is_wan(_distributed_names(folder))
        try:
            content = read_torch_file(file, "")
        except ModelError:
            return True  # of Megatron's shape; opening it says what is wrong
        return not (isinstance(content, dict) and is_wan(content.get("model")))

    @classmethod
    def open(cls, folder: Path, *, where: str, model: Path | None) -> WeightSource:
        inside = any(folder.glob("mp_rank_*"))  # an iteration's folder was named, not the one above it
        stored = model_files_in(folder.parent if inside else folder)
        config = model or stored
        if config is None:
            raise ModelError(
                f"{where}: a checkpoint of Megatron does not say all of its model's architecture. Name the original "
                "Hugging Face folder with --model"
            )
        arch = architecture(read_config(config), str(config / "config.json"))
        return McoreSource(read_rank_files(folder, where), arch, where=where, model=stored or model)

    def write(
        self, source: WeightSource, folder: Path, *, model: Path | None, progress: Callable[[int, int], None]
    ) -> None:
        if model is None:
            raise ModelError(
                f"{source.where}: the format mcore needs the model's config, and none came with these weights. Name "
                "the original Hugging Face folder with --model"
            )
        arch = architecture(read_config(model), str(model / "config.json"))
        _Writer(self.options, arch, source, folder, progress).write()
        copy_model_files(model, folder)


def _distributed_names(folder: Path) -> Sequence[str]:
    """The names in a distributed checkpoint, which only opening refuses; none when it is no such thing."""
    place = iteration_folder(folder)
    if place is None or not (place / ".metadata").is_file():
        return ()
    try:
        return DcpSource(place, where="", model=None).names()
    except ModelError:
        return ()


def stored_name(weight: Weight, first_layer: int, implementation: str) -> str:
    """The name in the file of the stage that begins with the layer `first_layer`."""
    if weight.layer is None:
        return weight.name
    rest = weight.name.removeprefix(f"decoder.layers.{weight.layer}.")
    if implementation == "transformer_engine":
        rest = _FUSED_NORMS.get(rest, rest)
    return f"decoder.layers.{weight.layer - first_layer}.{rest}"


# -------------------------------------------------------------------------------------------------------------- reading


class McoreSource(WeightSource):
    """The Hugging Face tensors of a Megatron checkpoint, each put together when it is read."""

    def __init__(self, ranks: RankFiles, arch: Architecture, *, where: str, model: Path | None) -> None:
        """Find every tensor of every rank. Raises ModelError unless they are those of `arch`."""
        self.where, self.model_folder, self.complete = where, model, True
        self._ranks, self._arch = ranks, arch
        check_args(ranks.args, arch, where)
        self._stages = self._stages_found()
        self._twin: list[StoredTensor] = []
        self._shards = self._shards_found()
        self._weight_of = {
            name: (weight, index)
            for weight in layout.weights(arch, pipeline_parallel=1)
            for index, name in enumerate(weight.sources)
        }
        self._last: tuple[str, list[Tensor]] | None = None

    def names(self) -> Sequence[str]:
        return list(self._weight_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return layout.source_shape(name, self._arch)

    def dtype(self, name: str) -> torch.dtype:
        weight, _ = self._weight_of[name]
        return self._shards[weight.name][0].dtype

    def read(self, name: str) -> Tensor:
        weight, index = self._weight_of[name]
        if self._last is None or self._last[0] != weight.name:
            self._last = None  # one fused tensor is held, not two
            self._last = (weight.name, self._parts(weight))
        return self._last[1][index]

    def _parts(self, weight: Weight) -> list[Tensor]:
        full = layout.unshard(weight, [shard.read() for shard in self._shards[weight.name]], self._arch)
        if self._twin and weight.name.startswith("embedding."):
            twin = layout.unshard(weight, [shard.read() for shard in self._twin], self._arch)
            if not torch.equal(full, twin):
                raise ModelError(
                    f"{self.where}: the output layer of the last stage differs from the embedding, but they are one "
                    "tied weight in the model"
                )
        return layout.split(weight, full, self._arch)

    def _stages_found(self) -> list[range]:
        counts = []
        for stage in range(self._ranks.pipeline_parallel):
            names = self._ranks.models[stage, 0]
            layers = sorted({int(found[1]) for name in names if (found := _LAYER.match(name))})
            if layers != list(range(len(layers))):
                raise ModelError(f"{self.where}: stage {stage} has the layers {layers}; they are counted from 0")
            counts.append(len(layers))
        if sum(counts) != self._arch.layers:
            raise ModelError(
                f"{self.where}: the checkpoint has {sum(counts)} layers ({', '.join(map(str, counts))} in its stages); "
                f"the model has {self._arch.layers}"
            )
        return layout.stage_layers(self._arch.layers, len(counts), counts)

    def _shards_found(self) -> dict[str, list[StoredTensor]]:
        """Every rank's part of every tensor, by its global name."""
        tp, problems = self._ranks.tensor_parallel, []
        found: dict[str, list[StoredTensor]] = {}
        seen: dict[tuple[int, int], set[str]] = {rank: set() for rank in self._ranks.models}
        for weight in layout.weights(self._arch, pipeline_parallel=2):  # a tied output layer may be stored or not
            stage = layout.stage_of(weight, self._stages)
            shards = []
            for rank in range(tp):
                names = self._ranks.models[stage, rank]
                stored = next((n for n in self._names(weight, stage) if n in names), None)
                if stored is not None:
                    seen[stage, rank].add(stored)
                    shards.append(names[stored])
            optional = self._arch.tied and weight.name == "output_layer.weight"
            if len(shards) == tp:
                problems += self._misshapen(weight, shards)
                if optional:
                    self._twin = shards
                else:
                    found[weight.name] = shards
            elif shards or not optional:
                problems.append(f"missing: {weight.name} (stage {stage})")
        for place, names in self._ranks.models.items():
            others = [n for n in names if n not in seen[place] and not _IGNORED.fullmatch(n)]
            problems += [f"unexpected: {name} (stage {place[0]}, rank {place[1]})" for name in others]
        if problems:
            more = f"\n  ... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
            raise ModelError(
                f"{self.where} does not hold the weights of this model:\n  " + "\n  ".join(problems[:SHOWN]) + more
            )
        return found

    def _names(self, weight: Weight, stage: int) -> list[str]:
        first = self._stages[stage].start
        return [stored_name(weight, first, implementation) for implementation in ("local", "transformer_engine")]

    def _misshapen(self, weight: Weight, shards: Sequence[StoredTensor]) -> list[str]:
        tp = self._ranks.tensor_parallel
        padded = sum(shard.shape[0] for shard in shards) if weight.kind == "vocab" else self._arch.vocab
        heads = (self._arch.heads, self._arch.kv_heads, self._arch.ffn)
        if padded < self._arch.vocab or any(n % tp for n in heads):
            return [f"of another shape: {weight.name}: {[shard.shape for shard in shards]} on the ranks"]
        expected = layout.shard_shape(weight, self._arch, tp, padded_vocab=padded)
        wrong = {shard.shape for shard in shards if shard.shape != expected}
        return [f"of another shape: {weight.name}: {s} on a rank, {expected} in the model" for s in wrong]


# -------------------------------------------------------------------------------------------------------------- writing


class _Writer:
    """Writes one rank's file after the other; one rank's tensors are held at a time."""

    def __init__(
        self,
        options: McoreOptions,
        arch: Architecture,
        source: WeightSource,
        folder: Path,
        progress: Callable[[int, int], None],
    ) -> None:
        self.options, self.arch, self.source, self.folder, self.progress = options, arch, source, folder, progress
        self.padded = layout.padded_vocabulary(arch.vocab, options.tensor_parallel, options.vocabulary_multiple)
        self.weights = layout.weights(arch, pipeline_parallel=options.pipeline_parallel)
        self._check()
        self.stages = layout.stage_layers(arch.layers, options.pipeline_parallel, options.layers_per_stage)
        self._done = 0
        self._total = options.tensor_parallel * sum(self._bytes(weight) for weight in self.weights)

    def write(self) -> None:
        iteration = self.folder / iteration_name(self.options.iteration)
        for stage, layers in enumerate(self.stages):
            inside = [weight for weight in self.weights if layout.stage_of(weight, self.stages) == stage]
            for rank in range(self.options.tensor_parallel):
                place = iteration / rank_folder(rank, stage, self.options.pipeline_parallel)
                model = {
                    stored_name(weight, layers.start, self.options.transformer_impl): self._shard(weight, rank)
                    for weight in inside
                }
                save_rank_file(self._checkpoint(model), place)
                del model
        word = "release" if self.options.iteration is None else str(self.options.iteration)
        (self.folder / LATEST).write_text(word, encoding="utf-8")

    def _checkpoint(self, model: Mapping[str, Tensor]) -> dict[str, object]:
        args = checkpoint_args(self.arch, self.options, padded_vocab=self.padded, dtype=self._dtype())
        return {
            "args": args,
            "checkpoint_version": CHECKPOINT_VERSION,
            "iteration": self.options.iteration or 0,
            "model": dict(model),
        }

    def _shard(self, weight: Weight, rank: int) -> Tensor:
        full = layout.merge(weight, [self.source.read(name) for name in weight.sources], self.arch)
        part = layout.shard(weight, full, rank, self.options.tensor_parallel, padded_vocab=self.padded)
        self._done += self._bytes(weight)
        self.progress(self._done, self._total)
        own = part.is_contiguous() and part.untyped_storage().nbytes() == part.nbytes
        return part if own else part.clone(memory_format=torch.contiguous_format)  # a view would bring its whole along

    def _bytes(self, weight: Weight) -> int:
        return torch.Size(layout.full_shape(weight, self.arch)).numel() * self.source.dtype(weight.sources[0]).itemsize

    def _dtype(self) -> torch.dtype:
        return self.source.dtype(self.weights[0].sources[0])

    def _check(self) -> None:
        """The layout divides the model, and the source has its tensors. Raises ModelError."""
        layout.check_layout(
            self.arch,
            tensor_parallel=self.options.tensor_parallel,
            pipeline_parallel=self.options.pipeline_parallel,
            uneven=self.options.layers_per_stage,
            where="format mcore",
        )
        shapes = {name: layout.source_shape(name, self.arch) for w in self.weights for name in w.sources}
        found = {name: self.source.shape(name) for name in self.source.names()}
        problems = [f"missing: {name}" for name in shapes if name not in found]
        problems += [f"unexpected: {name}" for name in found if name not in shapes]
        problems += [
            f"of another shape: {name}: {found[name]}, {shape} in the model"
            for name, shape in shapes.items()
            if name in found and found[name] != shape
        ]
        if problems:
            more = f"\n  ... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
            raise ModelError(
                f"{self.source.where} does not hold the weights of this model:\n  "
                + "\n  ".join(problems[:SHOWN])
                + more
            )
