"""Rotary frequencies of a Hugging Face config, for Megatron's rotary embedding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmrl_core.errors import ModelError
from mmrl_mindspeed.architecture import Architecture


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Angles are position * frequencies, on the first and second half of each head."""

    frequencies: Tensor
    """[head_dim / 2] fp32, radians a position."""
    factor: float
    """What cosines and sines are multiplied by (YaRN's attention factor); scores are then multiplied by its square."""


def rotary(arch: Architecture, where: str) -> Rotary:
    """The frequencies, in fp32 as transformers computes them. Raises ModelError for a scaling that depends on the
    length of the batch, which Megatron's table of frequencies cannot express."""
    exponents = torch.arange(0, arch.head_dim, 2, dtype=torch.int64).float() / arch.head_dim
    plain = 1.0 / (arch.rope_theta**exponents)
    scaling = arch.rope_scaling
    if scaling is None:
        return Rotary(frequencies=plain, factor=1.0)
    kind = scaling["rope_type"]
    if kind == "linear":
        return Rotary(frequencies=plain / scaling["factor"], factor=1.0)
    if kind == "llama3":
        return Rotary(frequencies=_llama3(plain, scaling), factor=1.0)
    if kind == "yarn":
        return _yarn(arch, exponents, scaling)
    raise ModelError(
        f"{where}: rope_scaling has rope_type {kind!r}, whose frequencies depend on the length of the batch; the "
        "backend megatron knows default, linear, llama3 and yarn. Use backend: fsdp2 for this model"
    )


def _llama3(plain: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, those between interpolated."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / plain
    scaled = torch.where(wavelength > context / low, plain / factor, plain)
    smooth = (context / wavelength - low) / (high - low)
    between = (1 - smooth) * scaled / factor + smooth * scaled
    is_between = ~(wavelength < context / high) & ~(wavelength > context / low)
    return torch.where(is_between, between, scaled)


def _yarn(arch: Architecture, exponents: Tensor, scaling: Mapping[str, Any]) -> Rotary:
    """YaRN (Peng et al. 2023, arXiv 2309.00071, section 3.2 and equation 22), with transformers' options."""
    context = scaling.get("original_max_position_embeddings") or arch.max_positions
    factor = scaling.get("factor") or arch.max_positions / context
    scale, scale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")

    def magnitude(weight: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    attention = scaling.get("attention_factor")
    if attention is None:
        attention = magnitude(scale) / magnitude(scale_all) if scale and scale_all else magnitude()

    def dimension(rotations: float) -> float:
        return arch.head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(arch.rope_theta))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, arch.head_dim - 1)
    ramp = (torch.arange(arch.head_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    kept = 1 - ramp.clamp(0, 1)
    periods = arch.rope_theta**exponents
    frequencies = 1.0 / (factor * periods) * (1 - kept) + 1.0 / periods * kept
    return Rotary(frequencies=frequencies, factor=float(attention))
