"""verl's Megatron engine on CPUs, for tests alone: what has to be changed in other people's code to get there.

- megatron-core's assumptions about CUDA: the patches of mmrl-mindspeed;
- verl lists the engine for CUDA and Ascend, and refuses fp32;
- mbridge moves modules to a CUDA device, as megatron-core's checkpoints do tensors;
- mbridge builds modules from TransformerEngine's layers, whose norms are inside the
  layers that follow them: here from megatron-core's own, so their weights have other names;
- verl passes a mask of padding, which TransformerEngine's attention reads together with the causal one and
  megatron-core's own takes for the whole mask: rows are padded at their ends, where the causal mask is enough;
- megatron-core 0.16.1 cannot load its distributed optimizer's state into torch's AdamW, which it takes where there is
  none of TransformerEngine or Apex: it looks for a tensor `step` that the checkpoint does not have and for state that
  AdamW makes in its first step (so the check takes one before it loads), and gives all parameters one counter;
- functions decorated with `torch.compile` stay as they are: to compile them takes longer than all the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

TRANSFORMER = {
    "use_cpu_initialization": True,
    "masked_softmax_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "gradient_accumulation_fusion": False,
}
"""Options of the backend: fields of Megatron's TransformerConfig that switch off CUDA's kernels."""


def prepare() -> None:
    """Change all of it, for the rest of this process."""
    torch.compile = cast(Any, lambda function=None, **_: function if function is not None else lambda f: f)
    from mmrl_mindspeed.cpu_patches import apply_for
    from mmrl_verl.megatron_backend import VerlMegatronBackend
    from mmrl_verl.platforms import choose

    choose("cpu")
    apply_for("cpu")
    for moved in (nn.Module, torch.Tensor):
        moved.cuda = cast(Any, lambda self, *_, **__: self)
    torch.cuda.synchronize = cast(Any, lambda *_: None)
    torch.cuda.current_device = cast(Any, lambda: torch.device("cpu"))
    _verl()
    _mbridge()
    _attention()
    _checkpoints()
    VerlMegatronBackend.device = "cpu"
    VerlMegatronBackend.precisions = ("float32", "bfloat16")


def seed(number: int) -> None:
    """What verl does where it sees a device: seed the random states of tensor parallelism."""
    from megatron.core import tensor_parallel

    tensor_parallel.model_parallel_cuda_manual_seed(number)


def _verl() -> None:
    from verl.workers.config import McoreEngineConfig
    from verl.workers.engine import EngineRegistry
    from verl.workers.engine.megatron import MegatronEngine, MegatronEngineWithLMHead

    EngineRegistry.register("language_model", ["megatron"], device=["cpu"])(MegatronEngineWithLMHead)
    checked = McoreEngineConfig.__post_init__

    def any_precision(self: Any) -> None:
        wanted = self.dtype
        object.__setattr__(self, "dtype", "bfloat16")
        checked(self)
        object.__setattr__(self, "dtype", wanted)

    McoreEngineConfig.__post_init__ = any_precision
    groups = MegatronEngine._init_device_mesh

    def groups_and_seeds(self: Any) -> None:
        groups(self)
        seed(self.engine_config.seed)

    MegatronEngine._init_device_mesh = groups_and_seeds


def _mbridge() -> None:
    import mbridge.core.util
    from mbridge.core.llm_bridge import LLMBridge
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from mmrl_mindspeed.cpu_replacements import torch_on_cpu

    mbridge.core.util.torch = torch_on_cpu(torch)

    def own_layers(self: Any, vp_stage: int | None = None) -> Any:
        self.has_vp_stage = True
        return get_gpt_decoder_block_spec(
            self.config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage
        )

    LLMBridge._get_transformer_layer_spec = own_layers
    hugging_face = LLMBridge._weight_name_mapping_mcore_to_hf

    def with_norms(self: Any, name: str) -> list[str]:
        layer, _, norm = name.removeprefix("decoder.layers.").partition(".")
        own = {"input_layernorm.weight": "input_layernorm", "pre_mlp_layernorm.weight": "post_attention_layernorm"}
        if norm in own:
            return [f"model.layers.{layer}.{own[norm]}.weight"]
        names: list[str] = hugging_face(self, name)
        return names

    LLMBridge._weight_name_mapping_mcore_to_hf = with_norms


def _attention() -> None:
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    forward: Callable[..., Any] = DotProductAttention.forward

    def causal(self: Any, query: Any, key: Any, value: Any, attention_mask: Any, *rest: Any, **named: Any) -> Any:
        return forward(self, query, key, value, None, *rest, **named)

    DotProductAttention.forward = causal


def _checkpoints() -> None:
    from megatron.core.dist_checkpointing import exchange_utils
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from mmrl_mindspeed.cpu_replacements import torch_on_cpu

    exchange_utils.torch = torch_on_cpu(torch)
    put: Callable[..., None] = DistributedOptimizer._set_main_param_and_optimizer_states

    def with_step(self: Any, parameter: Any, tensors: dict[str, torch.Tensor]) -> None:
        group, position = self.model_param_group_index_map[parameter]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][position]]
        put(self, parameter, {"step": state["step"], **tensors})

    DistributedOptimizer._set_main_param_and_optimizer_states = with_step
    load: Callable[..., None] = DistributedOptimizer.load_state_dict

    def with_own_steps(self: Any, state_dict: Any) -> None:
        load(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    DistributedOptimizer.load_state_dict = with_own_steps
