"""What can be said, and refused, before anything is loaded: the model's architecture against the layout asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from mmrl_core.checkpoint.formats import open_weights
from mmrl_core.checkpoint.matching import Wanted
from mmrl_core.contracts import TokenPolicy
from mmrl_core.errors import BackendError
from mmrl_core.text.model_folder import load_config
from mmrl_mindspeed.architecture import Architecture, architecture
from mmrl_mindspeed.layout import check_layout, source_shape, stage_layers, weights
from mmrl_mindspeed.rope import Rotary, rotary
from mmrl_mindspeed.weights import local_folder

if TYPE_CHECKING:
    from mmrl_mindspeed.options import MegatronOptions


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""One weight when it is tied; a checkpoint may hold it under either name."""


@dataclass(frozen=True, kw_only=True)
class TextPlan:
    """A text model divided as the options say."""

    arch: Architecture
    stages: Sequence[range]
    """The layers of each pipeline stage."""
    rotary: Rotary
    model_folder: Path
    """Where config.json is."""
    init_from: Path | None
    """Where the initial weights are, when not there."""

    def reader(self) -> Callable[[str], Tensor]:
        """Reads an initial weight by its Hugging Face name. Raises ModelError when the files are not the model's."""
        folder = self.init_from or self.model_folder
        source = open_weights(
            folder,
            where=f"model.{'path' if self.init_from is None else 'init_from'} {str(folder)!r}",
            model=self.model_folder,
            wanted=_wanted(self.arch),
        )
        stored = set(source.names())

        def read(name: str) -> Tensor:
            return source.read(name if name in stored or name != EMBEDDING else HEAD)

        return read


def _wanted(arch: Architecture) -> list[Wanted]:
    names = {name for weight in weights(arch, pipeline_parallel=1) for name in weight.sources}
    wanted = [
        Wanted(names=(name, HEAD) if arch.tied and name == EMBEDDING else (name,), shape=source_shape(name, arch))
        for name in sorted(names)
    ]
    # what early Llama checkpoints store beside the weights, and the config says too
    tables = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(arch.layers)]
    return wanted + [Wanted(names=(name,), shape=(arch.head_dim // 2,), required=False) for name in tables]


def text_plan(policy: TokenPolicy, options: MegatronOptions) -> TextPlan:
    """Check that Megatron can train the policy's model in this layout.

    Raises BackendError for what this backend does not do, ModelError for what the model or the layout does not allow.
    """
    model = policy.model
    if model.lora is not None:
        raise BackendError("backend megatron trains no adapters: remove model.lora, or use backend: fsdp2")
    if model.dtype == "float16":
        raise BackendError("backend megatron trains in float32 or bfloat16; model.dtype float16 needs loss scaling")
    if getattr(policy.options, "prefix_sharing", "auto") == "on":
        raise BackendError(
            "backend megatron computes every row's own prompt: model.policy.prefix_sharing must be auto or off"
        )
    arch = architecture(load_config(model).to_dict(), model.path)
    uneven = options.layers_per_stage
    check_layout(
        arch,
        tensor_parallel=options.tensor_parallel,
        pipeline_parallel=options.pipeline_parallel,
        uneven=uneven,
        where=f"backend megatron, model {model.path}",
    )
    return TextPlan(
        arch=arch,
        stages=stage_layers(arch.layers, options.pipeline_parallel, uneven),
        rotary=rotary(arch, model.path),
        model_folder=local_folder(model.path),
        init_from=None if model.init_from is None else Path(model.init_from).expanduser(),
    )
