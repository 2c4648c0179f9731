"""From a prompt to token ids: what open_clip's own CLIP tokenizer gives, computed with transformers' one."""

from __future__ import annotations

import html
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from mmrl_core.errors import RewardError

_WANTED = (
    "give the `tokenizer` folder of a FLUX.1 or SD3 checkpoint, or a CLIP model folder such as openai/clip-vit-base-"
    "patch32 (tokenizer.json, or vocab.json and merges.txt)"
)


class Prompts:
    """CLIP's byte-pair encoding, framed by start and end of text, cut to the context, padded with id 0.

    Text is cleaned as open_clip does: HTML entities decoded twice, runs of white space made one space, lower case;
    then Unicode's composed form (NFC). With `fix_text`, ftfy repairs it first. What looks like a special token in a
    prompt is text.
    """

    def __init__(self, folder: Path, *, vocabulary: int, context: int, fix_text: bool) -> None:
        """Load from `folder`, for a text tower with `vocabulary` embeddings. Raises RewardError."""
        tokenizer = _load(folder)
        self._context = context
        self._start, self._end = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._repair = _repair() if fix_text else None
        self._encoder: Any = tokenizer.backend_tokenizer
        self._encoder.encode_special_tokens = True  # a prompt cannot end itself early
        self._encoder.no_truncation()
        self._encoder.no_padding()
        size = len(tokenizer)
        if size != vocabulary:
            raise RewardError(
                f"tokenizer {folder} has {size} tokens, but the checkpoint's text embedding has {vocabulary} rows: it "
                f"belongs to another model. Cure: {_WANTED}"
            )
        if self._end != size - 1:
            raise RewardError(
                f"tokenizer {folder}: its end token has id {self._end}; the highest, {size - 1}, is needed, where "
                f"the text tower's feature is taken. Cure: {_WANTED}"
            )

    def encode(self, texts: Sequence[str]) -> Tensor:
        """[n, context] int64."""
        ids = torch.zeros(len(texts), self._context, dtype=torch.int64)
        for row, text in enumerate(texts):
            body = self._encoder.encode(self._clean(text), add_special_tokens=False).ids
            tokens = [self._start, *body[: self._context - 2], self._end]
            ids[row, : len(tokens)] = torch.tensor(tokens)
        return ids

    def _clean(self, text: str) -> str:
        if self._repair is not None:
            text = self._repair(text)
        return " ".join(html.unescape(html.unescape(text)).split()).lower()


def _load(folder: Path) -> CLIPTokenizer:
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise RewardError(f"tokenizer {folder} {what}. Cure: {_WANTED}")
    if not _holds_tokenizer(folder):
        below = next((f for f in ("tokenizer", "tokenizer_2") if _holds_tokenizer(folder / f)), None)
        hint = f" Did you mean {folder / below}?" if below else ""
        raise RewardError(f"tokenizer {folder} holds no CLIP tokenizer.{hint} Cure: {_WANTED}")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        known = tokenizer.get_vocab()
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise RewardError(
            f"tokenizer {folder} cannot be loaded ({type(error).__name__}: {reason}). Cure: {_WANTED}"
        ) from error
    if "a</w>" not in known:  # any byte-pair file loads; only CLIP's marks the ends of words
        raise RewardError(f"tokenizer {folder} is not CLIP's. Cure: {_WANTED}")
    return tokenizer


def _holds_tokenizer(folder: Path) -> bool:
    files = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    return files or (folder / "tokenizer.json").is_file()


def _repair() -> Callable[[str], str]:
    try:
        ftfy = importlib.import_module("ftfy")
    except ImportError as error:
        raise RewardError(
            f"reward 'hpsv2': fix_text needs ftfy ({error}). Cure: pip install 'mmrl-hpsv2[ftfy]', or fix_text: false"
        ) from error
    repair: Callable[[str], str] = ftfy.fix_text
    return repair
