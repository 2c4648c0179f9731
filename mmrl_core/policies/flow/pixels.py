"""From what a VAE decodes to pixels, as diffusers' image and video processors round them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmrl_core.errors import RolloutError


def to_pixels(decoded: Tensor) -> Any:
    """uint8 array [b, ..., H, W, 3] of channels-first values [b, 3, ..., H, W] in [-1, 1]; others are clamped.

    Raises RolloutError when a value is not finite: there is no picture to score.
    """
    if not bool(torch.isfinite(decoded).all()):
        raise RolloutError(
            f"the VAE decoded values that are not finite (in {str(decoded.dtype).removeprefix('torch.')}): the latents "
            "have diverged, or they overflow in model.policy.vae_dtype; float32 does not"
        )
    shown = (decoded * 0.5 + 0.5).clamp(0, 1)
    return (shown.float() * 255).round().to(torch.uint8).movedim(1, -1).cpu().numpy()
