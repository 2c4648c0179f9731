"""Options of the built-in rollout engines. Imports no torch."""

from __future__ import annotations

from typing import Literal

from mmrl_core.recipe import Positive, Spec


class HfOptions(Spec):
    """Generation with the transformers model itself."""

    weights: Literal["auto", "shared", "own"] = "auto"
    """shared: generate with the training network, which is then not held twice; own: a copy, updated every step; auto:
    shared where the training backend offers it, else own."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of own weights; the model's when not set."""
    max_rows: Positive = 512
    """Samples generated at once; more are generated in turns, whole groups at a time."""


class FlowEngineOptions(Spec):
    """Denoising with the policy's own network."""

    weights: Literal["auto", "shared", "own"] = "auto"
    """shared: denoise with the training network, which is then not held twice; own: a copy, updated every step; auto:
    shared where the training backend offers it, else own."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of own weights; the model's when not set."""
    max_rows: Positive = 256
    """Samples denoised at once; more are denoised in turns. Lower it when memory is short, and on a CPU: what a forward
    works on should stay in its cache."""
    decode_rows: Positive = 8
    """Samples decoded at once."""
    vae_tiling: bool = False
    """Decode in tiles: less memory for large pictures and video, with seams that the VAE blends."""
