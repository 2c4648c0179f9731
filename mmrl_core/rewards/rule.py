"""Rewards by rule: `numeric`, `exact`, `format` and `length`. They look at text only and need nothing loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from mmrl_core.contracts import Reward, RewardResult, Sample
from mmrl_core.errors import RewardError
from mmrl_core.rewards.function import reward
from mmrl_core.rewards.options import ExactOptions, FormatOptions, LengthOptions, NumericOptions

# A sign belongs to a number unless a digit, word or closing bracket stands right before it: in "10-3" the last
# number is 3. Groups of three digits may be separated by commas.
_NUMBER = re.compile(
    r"(?:(?<![\w)\].])[-+])?(?:\d{1,3}(?:,\d{3})+(?!,?\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3}(?!\d))?"
    r"|(?:(?<![\w)\].])[-+])?(?<![\d.])\.\d+",
    re.ASCII,
)


def numbers(text: str) -> list[Decimal]:
    """Every decimal number in the text, in order, exactly."""
    return [_decimal(found) for found in _NUMBER.findall(_ascii_minus(text))]


def _decimal(numeral: str) -> Decimal:
    return Decimal(numeral.replace(",", ""))


def _ascii_minus(text: str) -> str:
    return text.replace("\N{MINUS SIGN}", "-")


@reward
def numeric(sample: Sample, options: NumericOptions) -> RewardResult:
    """The last number in the text equals the reference (sub-score `correct`); the text is that right number and
    nothing else (sub-score `format`). The value is correct_weight * correct + format_weight * format.

    The reference is a number, or a text whose last number counts. A reference without a number fails the sample.
    """
    expected = _reference_number(sample)
    text = _ascii_minus(_text(sample))
    found = numbers(text)
    right = bool(found) and abs(found[-1] - expected) <= Decimal(str(options.tolerance))
    bare = right and _NUMBER.fullmatch(text.strip().rstrip(".")) is not None
    value = options.correct_weight * right + options.format_weight * bare
    return RewardResult(value=value, scores={"correct": float(right), "format": float(bare)})


def _reference_number(sample: Sample) -> Decimal:
    answer = _reference(sample)
    found = numbers(str(answer)) if not isinstance(answer, bool) else []
    if not found:
        raise RewardError(f"the reference answer {answer!r} of {_origin(sample)} holds no number")
    return found[-1]


@reward
def exact(sample: Sample, options: ExactOptions) -> float:
    """1 when the text (or what `extract` finds in it) equals the reference or one of a list of them, else 0."""
    text: str | None = _text(sample)
    if options.extract is not None and text is not None:
        matches = list(re.finditer(options.extract, text, re.DOTALL))
        text = matches[-1][1 if matches[-1].re.groups else 0] if matches else None
    if text is None:
        return 0.0
    answer: Any = _reference(sample)
    accepted = answer if isinstance(answer, list | tuple) else [answer]
    return float(_normal(text, options) in {_normal(str(a), options) for a in accepted})


def _normal(text: str, options: ExactOptions) -> str:
    text = text.strip() if options.strip else text
    return text.casefold() if options.casefold else text


class Format(Reward):
    """1 when the text matches the pattern, else 0."""

    options: FormatOptions

    def __init__(self, options: FormatOptions) -> None:
        super().__init__(options)
        pattern = re.compile(options.pattern, re.DOTALL)
        self._match = pattern.fullmatch if options.match == "full" else pattern.search

    def score(self, samples: Sequence[Sample]) -> list[RewardResult]:
        """One result a sample."""
        return [RewardResult(value=float(self._match(_text(sample)) is not None)) for sample in samples]


@reward
def length(sample: Sample, options: LengthOptions) -> float:
    """A reward of the sample's length L in `unit`.

    `band`: max(0, 1 - d / ramp) with d the distance from [minimum, maximum]; 1 inside, 0 outside when ramp is 0.

    `soft_overlong`: Soft Overlong Punishment, equation 13 of DAPO (Yu et al. 2025, arXiv:2503.14476), with
    L_max = maximum and L_cache = ramp: 0 for L <= L_max - L_cache; (L_max - L_cache - L) / L_cache up to L_max;
    -1 beyond.
    """
    size = _size(sample, options.unit)
    if options.shape == "soft_overlong":
        start = options.maximum - options.ramp
        if size <= start:
            return 0.0
        return -1.0 if size > options.maximum else (start - size) / options.ramp
    distance = max(options.minimum - size, size - options.maximum, 0)
    if distance == 0:
        return 1.0
    return max(0.0, 1.0 - distance / options.ramp) if options.ramp else 0.0


def _size(sample: Sample, unit: str) -> int:
    if unit == "actions":
        return sample.length
    text = _text(sample)
    return len(text) if unit == "characters" else len(text.split())


def _text(sample: Sample) -> str:
    if sample.text is None:
        raise RewardError("the sample has no text; this reward scores text policies only")
    return sample.text


def _reference(sample: Sample) -> Any:
    if sample.answer is None:
        raise RewardError(
            f"{_origin(sample)} has no reference answer; map one to `answer` in the recipe's data section"
        )
    return sample.answer


def _origin(sample: Sample) -> str:
    return sample.prompt.origin or f"prompt {sample.prompt.index}"
