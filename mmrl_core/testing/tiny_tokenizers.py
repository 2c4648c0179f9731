"""CLIP's and T5's tokenizers over printable ASCII, as transformers' own classes."""

from __future__ import annotations

import string
from typing import Any

WORDS = ("a", "the", "of", "in", "on", "photo", "red", "blue", "cat", "dog", "house", "sky", "two", "walks", "video")
"""Frequent words that T5's vocabulary holds whole."""


def clip_tokenizer(pad_token: str = "<|endoftext|>") -> Any:
    """CLIP's byte-level tokenizer (lower case, `</w>` at the end of words, 77 places) with next to no merges."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e</w>"), ("a", "t</w>")]
    pieces = [*alphabet, *(byte + "</w>" for byte in alphabet), *("".join(pair) for pair in merges)]
    vocabulary = {piece: number for number, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad_token, model_max_length=77)


def t5_tokenizer() -> Any:
    """T5's unigram tokenizer: characters and a few words; `</s>` at the end, 512 places."""
    from transformers import T5Tokenizer

    characters = sorted(string.ascii_letters + string.digits + string.punctuation)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [("▁" + word, -3.0) for word in WORDS] + [(character, -5.0) for character in characters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)
