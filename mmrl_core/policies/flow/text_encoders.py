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
        self.cut_rows: tuple[int, ...] = ()
        """Of the texts encoded last: which were too long."""
        self.cuts = 0
        """Texts that were too long, so far."""
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

    def note_cuts(self, name: str, texts: Sequence[str], length: int) -> None:
        """Count the texts longer than `length` tokens. The log has a warning of the first one only: a data set of long
        prompts would fill it."""
        counts = [len(ids) for ids in self.tokenizers[name](list(texts)).input_ids]
        self.cut_rows = tuple(row for row, count in enumerate(counts) if count > length)
        if self.cut_rows and not self.cuts:
            row = self.cut_rows[0]
            log.warning(
                "a prompt of %d tokens is cut to %d (model.policy.max_text_tokens), and so will longer ones be from "
                "here on, without further warning: %.60r",
                counts[row],
                length,
                texts[row],
            )
        self.cuts += len(self.cut_rows)
