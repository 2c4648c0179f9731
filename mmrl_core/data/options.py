"""Options of the built-in prompt sources. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mmrl_core.data.placeholders import placeholder_names
from mmrl_core.data.templates import unknown_template
from mmrl_core.recipe import Fraction, NonNegative, Positive, Spec

MAX_PROBLEMS = 10_000_000
"""Largest number of problems that `arithmetic` enumerates."""

Text = Annotated[str, Field(min_length=1)]


class ArithmeticOptions(Spec):
    """Sums, differences and products of two integers. The reference answer is the result, in digits."""

    operations: list[Literal["+", "-", "*"]] = Field(default=["+"], min_length=1)
    """Which operations to ask for."""
    smallest: int = 0
    """Smallest operand."""
    largest: int = 9
    """Largest operand, included."""
    split: Literal["train", "test", "all"] = "train"
    """Which problems to ask. `train` and `test` share none, whatever the ranges, operations, templates and seeds of the
    two: where a problem belongs depends on the problem alone (a + b and b + a go together)."""
    test_fraction: Fraction = 0.2
    """Share of the problems that belong to `test`. Must be the same for training and evaluation."""
    question_template: str = "What is {question}? Answer with the number only."
    """The user message; {question} is the expression, such as 3 + 4."""
    system: Text | None = None
    """System message, or null: none."""

    @model_validator(mode="after")
    def _consistent(self) -> ArithmeticOptions:
        if len(set(self.operations)) != len(self.operations):
            raise ValueError(f"operations {self.operations} names one twice")
        if self.smallest > self.largest:
            raise ValueError(f"smallest ({self.smallest}) is above largest ({self.largest})")
        problems = len(self.operations) * (self.largest - self.smallest + 1) ** 2
        if problems > MAX_PROBLEMS:
            raise ValueError(f"these ranges hold {problems:,} problems; at most {MAX_PROBLEMS:,} are enumerated")
        if max(abs(self.smallest), abs(self.largest)) >= 2**31:
            raise ValueError("operands must be below 2**31 in size")
        _only_placeholders(self.question_template, "question_template", {"question"})
        return self


class TableOptions(Spec):
    """Prompts from the rows of files (JSONL, a JSON array, or Parquet)."""

    path: Text | Annotated[list[Text], Field(min_length=1)]
    """A file, a glob pattern (`data/*.jsonl`), or a list of them. Rows are numbered through all files in this order;
    what a pattern matches is sorted by name."""
    prompt_column: Text = "prompt"
    """Column with the question: a string, or a list of chat messages ({role, content}). Dots reach into nested columns
    (here and below)."""
    answer_column: Text | None = "answer"
    """Column with the reference answer that rewards compare with, such as `reward_model.ground_truth`; null: none."""
    columns: list[Text] | None = None
    """Other top-level columns that rewards may see; null: all. Naming them saves memory with wide Parquet files."""
    template: Text = "chat"
    """How a conversation becomes text. `chat`: by the model's own chat template; `raw`: the prompt column is the text;
    the name of a built-in template, such as `qwen_r1`; or a path to a .jinja file."""
    system: Text | None = None
    """System message; replaces the row's own if it has one. null: the row's own, else the template's default."""
    user_template: Text | None = None
    """The user message, with {prompt} and {other_column} filled in from the row; null: the prompt alone. `{}` is plain
    text, `{{` and `}}` are single braces. With a list of messages it rewrites the last user message."""
    skip: NonNegative = 0
    """Rows to leave out at the start, so that training and evaluation can share a file."""
    limit: Positive | None = None
    """Use only so many rows (after `skip`), or null: all. The rows are chosen before shuffling."""
    shuffle: bool = True
    """A new order every epoch, from the run's seed; false: the order of the files."""

    @model_validator(mode="after")
    def _consistent(self) -> TableOptions:
        if self.template == "raw" and self.system is not None:
            raise ValueError("template: raw uses the text as it is and has no place for `system`; remove one of them")
        problem = None if self.template == "chat" else unknown_template(self.template)
        if problem is not None:
            raise ValueError(problem)
        if self.user_template is not None and not placeholder_names(self.user_template):
            raise ValueError("user_template has no {placeholder}: every row would be the same question")
        return self

    def paths(self) -> list[str]:
        """`path` as a list."""
        return [self.path] if isinstance(self.path, str) else list(self.path)


class EmbeddedCaptionsOptions(Spec):
    """Prompts with embeddings computed before, so that training loads no text encoder."""

    path: Text
    """A folder that `mmrl data embed` wrote; or a `videos2caption.json` (or the folder that holds it) with
    `prompt_embed/` and, where the model needs them, `pooled_prompt_embeds/` or `negative_prompt_embeds/` beside it. Its
    `text_ids` are not read: they follow from the number of tokens."""
    skip: NonNegative = 0
    """Prompts to leave out at the start, so that training and evaluation can share a file."""
    limit: Positive | None = None
    """Use only so many prompts (after `skip`), or null: all. They are chosen before shuffling."""
    shuffle: bool = True
    """A new order every epoch, from the run's seed; false: the order of the file."""


class ReasoningGymOptions(Spec):
    """Procedural tasks of the reasoning-gym package (`pip install 'mmrl-core[reasoning-gym]'`)."""

    dataset: Text
    """The task's name, such as `chain_sum`."""
    config: dict[str, Any] = Field(default_factory=dict)
    """The task's own settings, such as {min_terms: 2}; `size` and `seed` are the fields below."""
    size: Positive = 500
    """Questions in an epoch."""
    dataset_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """What the questions are made from. Many tasks make question i from dataset_seed + i, so give training and
    evaluation values that are further apart than `size`, or they share questions."""
    question_template: str = "{question}"
    """The user message; {question} is the task's text."""
    system: Text | None = None
    """System message, or null: none."""

    @model_validator(mode="after")
    def _consistent(self) -> ReasoningGymOptions:
        for name, field in (("size", "size"), ("seed", "dataset_seed")):
            if name in self.config:
                raise ValueError(f"config.{name}: write it as the option {field} instead")
        _only_placeholders(self.question_template, "question_template", {"question"})
        return self


class DigitsOptions(Spec):
    """The ten digits by name, for models that draw them. The reference answer is the digit."""

    template: str = "the digit {digit}"
    """The prompt."""

    @model_validator(mode="after")
    def _consistent(self) -> DigitsOptions:
        _only_placeholders(self.template, "template", {"digit"})
        return self


def _only_placeholders(template: str, field: str, allowed: set[str]) -> None:
    """Raises ValueError unless every name of `allowed`, and no other, occurs in the template."""
    names = set(placeholder_names(template))
    for name in sorted(allowed - names):
        raise ValueError(f"{field} {template!r} must contain {{{name}}}")
    for name in sorted(names - allowed):
        raise ValueError(f"{field} {template!r}: {{{name}}} is not known here; write {{{{{name}}}}} for the plain text")
