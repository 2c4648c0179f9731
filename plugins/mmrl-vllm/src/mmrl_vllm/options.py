"""Options, checked when a recipe is read. Imports no torch and no vLLM."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from mmrl_core.recipe import Positive, Spec

OWNED = (
    *("model", "tokenizer", "skip_tokenizer_init", "generation_config", "trust_remote_code", "dtype", "seed"),
    *("tensor_parallel_size", "distributed_executor_backend", "gpu_memory_utilization", "kv_cache_memory_bytes"),
    *("enforce_eager", "enable_prefix_caching", "enable_sleep_mode", "max_model_len", "max_num_seqs"),
    *("logprobs_mode", "max_logprobs", "pipeline_parallel_size", "data_parallel_size", "quantization", "load_format"),
)
"""Engine arguments of vLLM that another option sets, or that would break what this engine promises."""


class VllmOptions(Spec):
    """Generation with vLLM in the training process."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the engine's weights and cache; the model's when not set."""
    memory_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of a device's memory for the engine's weights, cache and work space while it generates. The training
    network's share is what remains, less when `sleep` is off. Not used on a CPU, nor with kv_cache_mb."""
    kv_cache_mb: Positive | None = None
    """Memory for keys and values in MiB, instead of what memory_fraction leaves. Not set on a CPU: 1024."""
    max_model_len: Positive | None = None
    """Longest prompt and response together, in tokens; the model's own limit when not set, which may want more cache
    than there is."""
    max_num_seqs: Positive = 256
    """Samples generated at once; more wait for their turn."""
    enforce_eager: bool | None = None
    """Run without captured graphs and compilation: starts faster, generates slower. Not set: true on a CPU, else
    false."""
    prefix_caching: bool = True
    """Compute a prompt once for all samples of its group, and what prompts share once for all of them."""
    sleep: bool = True
    """Give the device's memory back while the policy is trained (the weights wait in host memory). Nothing happens
    where vLLM has no such mode, as on a CPU."""
    tensor_parallel: Positive = 1
    """Neighbouring ranks that share one engine, each holding a part of the weights."""
    untested: bool = False
    """Allow what nobody has run yet: tensor_parallel on devices other than the CPU."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of vLLM's `LLM`, as vLLM names them, passed on unchecked. Not those that the options above
    set."""

    @field_validator("engine_args")
    @classmethod
    def _not_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(set(value) & set(OWNED))
        if taken:
            raise ValueError(f"{', '.join(taken)}: set by the engine itself or by another of its options")
        return value
