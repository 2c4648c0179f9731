"""Checkpoints of a sharded (or plain) module and its AdamW, through torch.distributed.checkpoint.

Any number of ranks can load what another number saved. Plugins whose modules are plain or sharded by `fully_shard` may
use these functions; a file BACKEND.json beside the tensors says who wrote them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from mmrl_core.backends.optimizer import AdamW
from mmrl_core.errors import BackendError


def save(directory: Path, module: nn.Module, adamw: AdamW, *, backend: str, optimizer: bool, main: bool) -> None:
    """Write the trained weights and, when asked, the optimizer, into `directory`. Collective.

    Args:
        backend: the component's word.
        main: true on the one rank that writes what is not a tensor.
    """
    from torch.distributed.checkpoint import state_dict_saver

    directory.mkdir(parents=True, exist_ok=True)
    state_dict_saver.save(_state(module, adamw, optimizer), checkpoint_id=str(directory))
    if main:
        facts = {"updates": adamw.updates, "skipped": adamw.skipped, "optimizer": optimizer}
        (directory / f"{backend}.json").write_text(json.dumps(facts), encoding="utf-8")


def load(directory: Path, module: nn.Module, adamw: AdamW, *, backend: str, optimizer: bool) -> None:
    """Restore what `save` wrote. Collective.

    Raises BackendError when another backend wrote it, or when it holds no optimizer and one is asked for.
    """
    from torch.distributed.checkpoint import state_dict_loader
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    marker = directory / f"{backend}.json"
    if not marker.is_file():
        raise BackendError(
            f"{directory}: the backend {backend} did not write this checkpoint ({marker.name} is missing). To start "
            "from the weights of another backend, use another run_dir and set model.init_from to the checkpoint"
        )
    facts = json.loads(marker.read_text(encoding="utf-8"))
    if optimizer and not facts["optimizer"]:
        raise BackendError(
            f"{directory}: this checkpoint holds no optimizer (it was written with checkpoint.save_optimizer: "
            "false). To go on with a fresh optimizer set checkpoint.load_optimizer: false"
        )
    state = _state(module, adamw, optimizer)
    state_dict_loader.load(state, checkpoint_id=str(directory))
    set_state_dict(
        module,
        adamw.torch_optimizer if optimizer else [],
        model_state_dict=state["model"],
        optim_state_dict=state.get("optimizer", {}),
        options=StateDictOptions(strict=False, ignore_frozen_params=True),
    )
    if optimizer:
        adamw.updates, adamw.skipped = facts["updates"], facts["skipped"]


def _state(module: nn.Module, adamw: AdamW, optimizer: bool) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    # frozen weights come from model.path; with LoRA a checkpoint is as small as the adapters
    options = StateDictOptions(ignore_frozen_params=True)
    state: dict[str, Any] = {"model": get_model_state_dict(module, options=options)}
    if optimizer:
        state["optimizer"] = get_optimizer_state_dict(module, adamw.torch_optimizer, options=options)
    return state
