"""Peak rates of NVIDIA chips from their data sheets, for utilisation metrics. Imports no torch.

`flops` are dense (no structured sparsity: data sheets often print the doubled number) matrix-product rates with fp32
accumulation, in FLOP/s at boost clock; `float32` is the rate outside tensor cores. `bandwidth` is in bytes/s. A chip
that is not listed, or a slice of one (MIG), is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_T = 1e12
_G = 1e9


@dataclass(frozen=True, kw_only=True)
class Peak:
    """One chip's rates."""

    flops: Mapping[str, float]
    """FLOP/s by dtype name (`bfloat16`, `float16`, `tf32`, `float32`)."""
    bandwidth: float
    """Bytes/s."""


def _peak(half: float, tf32: float | None, single: float, bandwidth: float, *, bfloat16: bool = True) -> Peak:
    """From TFLOP/s and GB/s."""
    flops = {"float16": half * _T, "float32": single * _T}
    if bfloat16:
        flops["bfloat16"] = half * _T
    if tf32 is not None:
        flops["tf32"] = tf32 * _T
    return Peak(flops=flops, bandwidth=bandwidth * _G)


_PEAKS: tuple[tuple[str, Peak], ...] = (
    # NVIDIA V100 Tensor Core GPU data sheet (Jan 2020). Volta has neither bfloat16 nor TF32 units.
    (r"(NVIDIA )?(Tesla )?V100-SXM[23]-(16|32)GB", _peak(125, None, 15.7, 900, bfloat16=False)),
    (r"(NVIDIA )?(Tesla )?V100-PCIE-(16|32)GB", _peak(112, None, 14.0, 900, bfloat16=False)),
    (r"(NVIDIA )?(Tesla )?V100S-PCIE-32GB", _peak(130, None, 16.4, 1134, bfloat16=False)),
    # NVIDIA A100 Tensor Core GPU data sheet (40 GB: Nov 2020 edition; 80 GB: June 2021 edition).
    (r"(NVIDIA )?A100-(SXM4|PCIE)-40GB", _peak(312, 156, 19.5, 1555)),
    (r"(NVIDIA )?A100-SXM4-80GB", _peak(312, 156, 19.5, 2039)),
    (r"(NVIDIA )?A100 80GB PCIe", _peak(312, 156, 19.5, 1935)),
    # NVIDIA H100 Tensor Core GPU data sheet; tensor rates printed "with sparsity" are halved here.
    (r"NVIDIA H100 80GB HBM3", _peak(989.5, 494.5, 67, 3350)),
    (r"NVIDIA H100 PCIe", _peak(756.5, 378, 51, 2000)),
    (r"NVIDIA H100 NVL", _peak(835.5, 417.5, 60, 3900)),
    # NVIDIA H200 Tensor Core GPU data sheet; halved likewise.
    (r"NVIDIA H200", _peak(989.5, 494.5, 67, 4800)),
    (r"NVIDIA H200 NVL", _peak(835.5, 417.5, 60, 4800)),
    # NVIDIA L40S and L4 data sheets (L40S prints dense | sparse; L4 prints sparse only, halved).
    (r"NVIDIA L40S", _peak(362.05, 183, 91.6, 864)),
    (r"NVIDIA L4", _peak(121, 60, 30.3, 300)),
    # NVIDIA Ada GPU Architecture whitepaper v2.1, table 2: FP16/BF16 tensor with FP32 accumulate, dense.
    (r"NVIDIA GeForce RTX 4090", _peak(165.2, 82.6, 82.6, 1008)),
    # NVIDIA Ampere GA102 GPU Architecture whitepaper v2.1, table 9: likewise.
    (r"NVIDIA GeForce RTX 3090", _peak(71, 35.6, 35.6, 936)),
)


def peak_of(device_name: str) -> Peak | None:
    """The rates of the chip that the driver calls `device_name`, or None: unknown is unknown."""
    for pattern, peak in _PEAKS:
        if re.fullmatch(pattern, device_name.strip()):
            return peak
    return None
