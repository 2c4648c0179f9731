"""The denoising network behind one door, with adapters and starting weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmrl_core.checkpoint.initial_weights import load_initial
from mmrl_core.lora import add_adapters
from mmrl_core.policies.flow.family import Family
from mmrl_core.recipe import ModelSpec


class FlowNetwork(nn.Module):
    """Every use is `network(function, ...)`, one forward of the root.

    Arguments reach the function as they are: sharding backends must not cast them, for a time in low precision is
    another time.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run `function(network, *arguments)`."""
        result = function(self.network, *arguments)
        # FSDP hangs a hook on what the root returns, and on a view an operation in place would lose it
        return result.clone() if isinstance(result, Tensor) and result._is_view() else result


def build(family: Family, model: ModelSpec, dtype: torch.dtype, *, adapters: bool) -> FlowNetwork:
    """The family's network with the recipe's starting weights and adapters, on the CPU, dropout off."""
    network = family.load_network(dtype)
    network.requires_grad_(True)
    if model.init_from is not None:
        load_initial(network, model.init_from, hugging_face_name, model=model.path)
    if adapters and model.lora is not None:
        add_adapters(network, model.lora)
    return FlowNetwork(network).eval()


def hugging_face_name(parameter: str) -> str:
    """The diffusers name of a parameter of FlowNetwork or of the network in it."""
    return parameter.removeprefix("network.").replace(".base_layer.", ".")
