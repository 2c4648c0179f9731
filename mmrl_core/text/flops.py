"""Floating-point operations that a decoder-only model needs, counted from its configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class DecoderSize:
    """What the operations of a forward pass depend on."""

    layer_weights: int
    """Weights of all matrix products below the head, each used once a token."""
    head_weights: int
    """Weights of the head: hidden size times vocabulary."""
    attention_width: int
    """Query heads times their width, summed over layers."""

    @classmethod
    def of(cls, config: Any) -> DecoderSize | None:
        """Of a transformers configuration; None for models with experts, of which a token uses only some.

        The model is built without memory, and its linear layers are counted.
        """
        if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
            return None
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        head = model.get_output_embeddings()
        linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            layer_weights=sum(m.weight.numel() for m in linear),
            head_weights=head.weight.numel(),
            attention_width=config.num_hidden_layers * config.num_attention_heads * width,
        )

    def forward(self, groups: Sequence[tuple[int, Sequence[int]]]) -> float:
        """FLOPs of one forward over (prompt length, response lengths) of each group, the prompt computed once.

        A token costs 2 FLOPs a weight, and 4 times the attention width for each token that it attends to (scores and
        weighted sum). The last response token is predicted and not fed; the head works on response tokens only.
        """
        total = 0
        for prompt, responses in groups:
            total += 2 * self.layer_weights * prompt + 2 * self.attention_width * prompt * (prompt + 1)
            for response in responses:
                fed = response - 1
                attended = fed * prompt + fed * (fed + 1) // 2
                total += 2 * self.layer_weights * fed + 4 * self.attention_width * attended
                total += 2 * self.head_weights * response
        return float(total)
