"""Options of the built-in policies. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from mmrl_core.recipe import Fraction, NonNegative, Positive, Spec


class CausalLmOptions(Spec):
    """Text models (`AutoModelForCausalLM`)."""

    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers."""
    prefix_sharing: Literal["auto", "on", "off"] = "auto"
    """Compute a group's prompt once in training. auto: when it saves at least a tenth of the tokens."""
    logits_memory_mb: Positive = 512
    """Logits alive at once in training; above it they are recomputed in the backward pass, chunk by chunk."""
    max_prompt_tokens: Positive | None = None
    """Longest prompt, or null: no limit."""
    long_prompts: Literal["error", "skip"] = "error"
    """A longer prompt stops the run with its row named, or is skipped and counted in the metrics."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Extra variables for the model's chat template, such as enable_thinking."""


class TokenSampling(Spec):
    """How tokens are sampled. Replay applies the same temperature."""

    evaluation_defaults: ClassVar[dict[str, Any]] = {"temperature": 0.0}

    max_new_tokens: Positive = 128
    """Longest response."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Divides the logits; 0: greedy, for evaluation only."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Keep the smallest set of tokens with this probability."""
    top_k: NonNegative = 0
    """Keep the k likeliest tokens; 0: all."""
    min_p: Fraction = 0.0
    """Keep tokens at least this fraction as likely as the likeliest."""
    ignore_eos: bool = False
    """Always generate max_new_tokens (for benchmarks)."""
