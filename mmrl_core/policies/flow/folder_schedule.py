"""Noise levels as the scheduler in a pipeline's folder sets them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrl_core.errors import ModelError

TIME_SCALE = 1000
"""Networks see time as TIME_SCALE times sigma; schedulers call it `num_train_timesteps`."""


def resolution_shift(config: Mapping[str, Any], tokens: int, *, max_shift: float) -> float:
    """mu of a schedule that depends on the resolution: the line through (base_image_seq_len, base_shift) and
    (max_image_seq_len, max_shift), at `tokens` image tokens. `max_shift`: for a configuration without one."""
    fewest, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
    return float(low + (tokens - fewest) * (high - low) / (most - fewest))


def folder_sigmas(scheduler: Any, steps: int, folder: Path, **settings: Any) -> Tensor:
    """[steps + 1] fp32: the scheduler's sigmas for `set_timesteps(**settings)`, which must be a flow's.

    Raises ModelError when the scheduler takes no such settings, or its levels are not those of a flow that falls from
    at most 1 to 0.
    """
    name = type(scheduler).__name__
    file = folder / "scheduler" / "scheduler_config.json"
    other = "set sampling.schedule: linear, with sampling.shift, instead"
    if scheduler.config.get("num_train_timesteps", TIME_SCALE) != TIME_SCALE:
        raise ModelError(
            f"{file}: num_train_timesteps is {scheduler.config.num_train_timesteps}; the networks of this policy count "
            f"time to {TIME_SCALE}"
        )
    try:
        scheduler.set_timesteps(**settings)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{file}: {name} cannot be set as this pipeline does: {error}; {other}") from error
    sigmas = torch.as_tensor(getattr(scheduler, "sigmas", [])).to("cpu", torch.float32)
    falls = bool((sigmas.diff() < 0).all())
    if sigmas.shape != (steps + 1,) or not falls or not (sigmas[0] <= 1 and sigmas[-1] == 0):
        raise ModelError(
            f"{file}: {name} gives no flow-matching schedule for {steps} steps (sigmas that fall from at most 1 to 0, "
            f"one more than steps) but {[round(float(s), 4) for s in sigmas]}; {other}"
        )
    return sigmas
