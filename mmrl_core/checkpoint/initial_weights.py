"""Weights to start from, out of a folder of any installed weight format."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from mmrl_core.checkpoint.formats import open_weights
from mmrl_core.checkpoint.matching import match, read_tied, wanted_of

log = logging.getLogger("mmrl.model")


@torch.no_grad()
def load_initial(module: nn.Module, folder: str, name_of: Callable[[str], str], *, model: str | None = None) -> None:
    """Replace the module's parameters (and those of its buffers that the checkpoint holds) by those of `folder`.

    Runs on this process alone, without collectives. Tensors are found by their Hugging Face name behind one common
    prefix and converted to the module's dtypes. What belongs to an optimizer, or stands behind another prefix, is left
    alone. A tied weight may be stored under any of its names, or under several with one value. mmrl's own checkpoints
    are found by their `step_...` folder or its `backend` folder.

    Args:
        module: on the CPU, not sharded, without adapters.
        folder: of any installed weight format; what torch.distributed.checkpoint wrote may come from any number of
            ranks.
        name_of: the Hugging Face name of a parameter or buffer of `module`.
        model: the folder with the model's config, for formats that hold none.

    Raises:
        ModelError: the folder is of no installed format, or does not hold every parameter exactly once with its shape
            and nothing else.
    """
    where = f"model.init_from {folder!r}"
    source = open_weights(Path(folder), where=where, model=None if model is None else Path(model))
    wanted = wanted_of(module, name_of)
    found = match(source, wanted)
    count = 0
    for target, names in zip(wanted, found, strict=True):
        if names:
            assert target.tensor is not None
            target.tensor.copy_(read_tied(source, names))
            count += 1
    log.info("%d tensors from %s", count, folder)
