"""What megatron-core needs to run here, as patches: it takes for granted that tensors live on a CUDA device.

Applied by the backend at set-up, and taken back when it is done. Nothing of PyTorch itself is changed: only attributes
of Megatron's own modules are. Imports no torch: the replacements are in `cpu_replacements`.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence

from mmrl_core import Patch
from mmrl_core.errors import BackendError
from mmrl_core.patches import Applied, apply
from mmrl_mindspeed.probe import VERSIONS, megatron

DISTRIBUTION = "megatron-core"
_CORE = "megatron.core"
_REPLACEMENTS = "mmrl_mindspeed.cpu_replacements"

_MODULES = (
    "parallel_state",
    "utils",
    "tensor_parallel.layers",
    "tensor_parallel.mappings",
    "tensor_parallel.random",
    "tensor_parallel.utils",
    "models.common.embeddings.rotary_pos_embedding",
    "models.common.embeddings.yarn_rotary_pos_embedding",
    "models.gpt.gpt_model",
    "transformer.attention",
    "transformer.dot_product_attention",
    "transformer.transformer_layer",
    "transformer.utils",
    "pipeline_parallel.p2p_communication",
    "pipeline_parallel.schedules",
    "distributed.distributed_data_parallel",
    "distributed.param_and_grad_buffer",
    "optimizer.clip_grads",
    "optimizer.distrib_optimizer",
    "optimizer.grad_scaler",
    "optimizer.optimizer",
)
"""Modules of megatron.core, in 0.12.1 as in 0.16.1, that ask `torch.cuda` for something or create CUDA tensors."""


def patches() -> Sequence[Patch]:
    """The patches, as data."""
    return [
        Patch(
            name="cpu-torch",
            targets=tuple(f"{_CORE}.{module}:torch" for module in _MODULES),
            replacement=f"{_REPLACEMENTS}:torch_on_cpu",
            reason='Megatron asks torch.cuda for its device and generator and creates tensors on "cuda"',
            distribution=DISTRIBUTION,
            versions=VERSIONS,
            devices=("cpu",),
        ),
        Patch(
            name="cpu-generator-read",
            targets=(f"{_CORE}.tensor_parallel.random:_get_cuda_rng_state",),
            replacement=f"{_REPLACEMENTS}:read_generator",
            reason="the random states that Megatron keeps for tensor parallelism are those of a CUDA generator",
            distribution=DISTRIBUTION,
            versions=VERSIONS,
            devices=("cpu",),
        ),
        Patch(
            name="cpu-generator-write",
            targets=(f"{_CORE}.tensor_parallel.random:_set_cuda_rng_state",),
            replacement=f"{_REPLACEMENTS}:write_generator",
            reason="the random states that Megatron keeps for tensor parallelism are those of a CUDA generator",
            distribution=DISTRIBUTION,
            versions=VERSIONS,
            devices=("cpu",),
        ),
        Patch(
            name="cpu-type-names",
            targets=tuple(
                f"{_CORE}.optimizer.{function}.__code__"
                for function in (
                    "clip_grads:clip_grad_by_total_norm_fp32",
                    "distrib_optimizer:DistributedOptimizer.__init__",
                    "distrib_optimizer:DistributedOptimizer._build_model_and_main_param_groups.__func__",
                    "optimizer:Float16OptimizerWithFloat16Params.__init__",
                )
            ),
            replacement=f"{_REPLACEMENTS}:cpu_type_names",
            reason='Megatron\'s optimizers recognise parameters by the names of CUDA types ("torch.cuda.FloatTensor")',
            distribution=DISTRIBUTION,
            versions=VERSIONS,
            devices=("cpu",),
        ),
        Patch(
            name="cpu-tied-embeddings",
            targets=(
                f"{_CORE}.models.common.language_module.language_module:"
                "LanguageModule.setup_embeddings_and_output_layer.__code__",
            ),
            replacement=f"{_REPLACEMENTS}:stay_on_cpu",
            reason="Megatron moves tied embeddings to a CUDA device before it compares them between pipeline stages",
            distribution=DISTRIBUTION,
            versions=VERSIONS,
            devices=("cpu",),
        ),
        Patch(
            name="cpu-pipeline-counter",
            targets=(f"{_CORE}.pipeline_parallel.schedules:forward_backward_pipelining_without_interleaving.__code__",),
            replacement=f"{_REPLACEMENTS}:stay_on_cpu",
            reason="the pipeline schedule moves its counter of tokens to a CUDA device",
            distribution=DISTRIBUTION,
            versions=">=0.12.1,<0.13",
            devices=("cpu",),
        ),
        Patch(
            name="no-fp8-weights",
            targets=(f"{_CORE}.fp8_utils:_quantize_param_shard_impl",),
            replacement=f"{_REPLACEMENTS}:only_when_asked",
            reason="without TransformerEngine the distributed optimizer stops at its first step, fp8 or not",
            distribution=DISTRIBUTION,
            versions=">=0.12.1,<0.13",
            devices=("cpu", "cuda"),
        ),
    ]


def apply_for(device: str) -> Applied:
    """Apply what megatron-core needs on `device` (on `npu` nothing: there MindSpeed does it) and return the handle that
    takes it back: `with apply_for("cpu"): ...`, or its `revert()`.

    Raises BackendError when megatron-core is missing or of another version than this plugin was made for.
    """
    check_version()
    return apply(patches(), device=device)


def check_version() -> str:
    """The version of megatron-core; BackendError when there is none that fits."""
    found = megatron()
    if not found.available:
        raise BackendError(f"backend megatron: {found.reason}. Cure: {found.cure}")
    return importlib.metadata.version(DISTRIBUTION)
