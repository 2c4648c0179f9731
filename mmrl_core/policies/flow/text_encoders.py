"""Text encoders with their tokenizers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmrl_core.policies.flow.diffusers_folder import DiffusersFolder

log = logging.getLogger("mmrl.model")

EncoderClasses = tuple[str, tuple[str, ...]]
"""The class of a text encoder, and those that its tokenizer may have."""

CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
T5_TOKENIZERS = ("T5Tokenizer", "T5TokenizerFast")


class TextEncoders(nn.Module):
    """A pipeline's text encoders, frozen, under their names in its index."""

    def __init__(self, folder: DiffusersFolder, dtype: torch.dtype, classes: Mapping[str, EncoderClasses]) -> None:
        """Load them in `dtype` on the CPU. Raises ModelError."""
        super().__init__()
        self.models = nn.ModuleDict()
        self.tokenizers: dict[str, Any] = {}
        for name, (encoder, tokenizers) in classes.items():
            tokenizer = name.replace("text_encoder", "tokenizer")
            self.tokenizers[name] = folder.tokenizer(tokenizer, *tokenizers)
            self.models[name] = folder.model(name, dtype, encoder).requires_grad_(False)
        self.eval()

    def tokens(self, name: str, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Token ids and mask, int64 [b, length] each, where the encoder is: padded to `length`, longer texts cut."""
        batch = self.tokenizers[name](
            list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        device = next(self.models[name].parameters()).device
        return batch.input_ids.to(device), batch.attention_mask.to(device)

    def warn_of_cuts(self, name: str, texts: Sequence[str], length: int) -> None:
        """Say in the log which texts are longer than `length` tokens."""
        counts = [len(ids) for ids in self.tokenizers[name](list(texts)).input_ids]
        for text, count in zip(texts, counts, strict=True):
            if count > length:
                log.warning(
                    "a prompt of %d tokens is cut to %d (model.policy.max_text_tokens): %.60r", count, length, text
                )
