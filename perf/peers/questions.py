"""The prompts of a comparison: single-digit sums, rendered by the model's chat template."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

FILLER = " and"
"""One token in the vocabularies of byte-pair tokenizers; repeated to make a prompt longer."""


def write_questions(path: Path, tokenizer: Any, *, count: int, prompt_tokens: int | None, seed: int = 0) -> list[int]:
    """Write `count` questions, any 4 in a row different. Returns the length of each in tokens, chat template included.

    With `prompt_tokens` each has exactly that many: filler is put before the question. Raises SystemExit when that is
    not possible.
    """
    sums = [(left, right) for left in range(1, 10) for right in range(1, 9)]
    random.Random(seed).shuffle(sums)  # 72 of them: whole steps of 4, so that a repeated round starts a step anew
    lengths = []
    rows = []
    for number in range(count):
        left, right = sums[number % len(sums)]
        question = f"What is {left}+{right}? Answer with the number only."
        content = question if prompt_tokens is None else padded(question, tokenizer, prompt_tokens)
        messages = [{"role": "user", "content": content}]
        lengths.append(length(messages, tokenizer))
        rows.append({"prompt": messages, "answer": str(left + right), "number": number})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return lengths


def length(messages: list[dict[str, str]], tokenizer: Any) -> int:
    """Tokens of a rendered conversation, the start of the answer included."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return len(tokenizer(text, add_special_tokens=False).input_ids)


def padded(question: str, tokenizer: Any, prompt_tokens: int) -> str:
    """The question with filler before it, so that the conversation has exactly `prompt_tokens` tokens."""

    def content(words: int) -> str:
        return f"Read{FILLER * words}. {question}"

    missing = prompt_tokens - length([{"role": "user", "content": content(0)}], tokenizer)
    if missing >= 0:
        text = content(missing)
        if length([{"role": "user", "content": text}], tokenizer) == prompt_tokens:
            return text
    raise SystemExit(f"--prompt-tokens {prompt_tokens}: {question!r} cannot have exactly so many with this tokenizer")
