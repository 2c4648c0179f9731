"""The ten digits by name."""

from __future__ import annotations

import hashlib
import json

from mmrl_core.contracts import Prompt, PromptSource
from mmrl_core.data.options import DigitsOptions
from mmrl_core.data.order import EpochOrder
from mmrl_core.data.placeholders import fill

DIGITS = 10


class DigitsSource(PromptSource):
    """Ten prompts an epoch, one a digit, each epoch in its own order. The answer is the digit as a string."""

    options: DigitsOptions

    def __init__(self, options: DigitsOptions, seed: int) -> None:
        super().__init__(options, seed)
        self._order = EpochOrder(DIGITS, seed)

    def prepare(self) -> None:
        """There is nothing to open."""

    def __len__(self) -> int:
        return DIGITS

    def prompt(self, index: int) -> Prompt:
        """The `index`-th prompt of the run."""
        digit = str(self._order.row(index))
        text = fill(self.options.template, lambda _: digit)
        return Prompt(index=index, text=text, answer=digit, origin=f"digits: {digit}")

    def digest(self) -> str:
        """Of the options and the seed, which determine everything."""
        described = ["digits", self.options.model_dump(mode="json"), self.seed]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()
