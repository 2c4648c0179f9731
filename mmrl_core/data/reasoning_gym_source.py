"""Prompts from reasoning-gym's procedural, verifiable tasks (an extra)."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from mmrl_core.contracts import Prompt, PromptSource
from mmrl_core.data.options import ReasoningGymOptions
from mmrl_core.data.order import EpochOrder
from mmrl_core.data.placeholders import fill
from mmrl_core.data.probes import REASONING_GYM_CURE
from mmrl_core.errors import DataError, PluginError, nearest


class ReasoningGymSource(PromptSource):
    """Questions of one task. `columns["entry"]` is the task's entry, which its verifier scores answers against, and
    `columns["dataset"]` the task's name."""

    options: ReasoningGymOptions

    def __init__(self, options: ReasoningGymOptions, seed: int) -> None:
        super().__init__(options, seed)
        self._dataset: Any = None
        self._order = EpochOrder(options.size, seed)

    def prepare(self) -> None:
        """Set the task up and make its first question.

        Raises PluginError when reasoning-gym is not installed, DataError when the task does not exist, refuses its
        configuration or cannot make a question.
        """
        try:
            from reasoning_gym import factory
        except ImportError as error:
            raise PluginError(
                f"prompt source reasoning_gym needs the package reasoning-gym ({error}). Cure: {REASONING_GYM_CURE}"
            ) from error
        options = self.options
        if options.dataset not in factory.DATASETS:
            hint = nearest(options.dataset, factory.DATASETS)
            raise DataError(
                f"reasoning_gym: no dataset called {options.dataset!r}.{hint} Known: {', '.join(factory.DATASETS)}"
            )
        try:
            self._dataset = factory.create_dataset(
                options.dataset, **options.config, size=options.size, seed=options.dataset_seed
            )
        except (TypeError, ValueError, AssertionError, LookupError) as error:  # how its configurations say no
            raise DataError(
                f"reasoning_gym: {options.dataset} refuses config {options.config}: {error or type(error).__name__}"
            ) from error
        self._entry(0)

    def __len__(self) -> int:
        return self.options.size

    def prompt(self, index: int) -> Prompt:
        """The `index`-th question of the run. Raises DataError when the task cannot make it."""
        number = self._order.row(index)
        entry = self._entry(number)
        question = fill(self.options.question_template, lambda _: entry["question"])
        messages = [{"role": "user", "content": question}]
        if self.options.system is not None:
            messages.insert(0, {"role": "system", "content": self.options.system})
        return Prompt(
            index=index,
            messages=tuple(messages),
            answer=entry["answer"],
            columns={"entry": entry, "dataset": self.options.dataset},
            origin=self._origin(number),
        )

    def digest(self) -> str:
        """Of the options, the seed and the first questions, which tell versions of reasoning-gym apart."""
        described = [
            "reasoning_gym",
            self.options.model_dump(mode="json"),
            self.seed,
            [self._entry(number)["question"] for number in range(min(len(self), 4))],
        ]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def _origin(self, number: int) -> str:
        return f"reasoning_gym: {self.options.dataset}, seed {self.options.dataset_seed}, question {number}"

    def _entry(self, number: int) -> dict[str, Any]:
        assert self._dataset is not None, "prepare() comes first"
        try:
            entry: dict[str, Any] = self._dataset[number]
        except Exception as error:  # the task is a stranger's code; the error names it and stops the run
            raise DataError(f"{self._origin(number)} cannot be made: {type(error).__name__}: {error}") from error
        if not isinstance(entry.get("question"), str) or "answer" not in entry:
            raise DataError(f"{self._origin(number)}: the entry has no question and answer, only {sorted(entry)}")
        return entry
