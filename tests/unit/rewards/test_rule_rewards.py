from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mmrl_core.contracts import Prompt, RewardResult, Sample
from mmrl_core.rewards.options import ExactOptions, FormatOptions, LengthOptions, NumericOptions
from mmrl_core.rewards.rule import Format, exact, length, numbers, numeric


def sample(text: str | None, answer: Any = None, size: int = 0) -> Sample:
    prompt = Prompt(index=3, text="q", answer=answer, origin="data.jsonl:4")
    return Sample(sample_id=0, group_id=0, prompt=prompt, text=text, length=size)


def score(reward: Any, options: Any, one: Sample) -> RewardResult:
    (result,) = reward.create(options).score([one])
    assert isinstance(result, RewardResult)
    return result


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10-3 = 7", ["10", "3", "7"]),
        ("-5 and (-6), +7", ["-5", "-6", "7"]),
        ("f(2)-3", ["2", "3"]),
        ("x = \u22124", ["-4"]),
        ("1,234,567.50 of 1,23", ["1234567.50", "1", "23"]),
        ("1,2,3", ["1", "2", "3"]),
        (".5 and 3.", ["0.5", "3"]),
        ("1.5e3 1e-2 2e", ["1500", "0.01", "2"]),
        ("version 1.2.3", ["1.2", "3"]),
        ("none", []),
        ("5,000,", ["5000"]),
        ("\u0663", []),
    ],
)
def test_numbers_in_text(text: str, expected: list[str]) -> None:
    assert numbers(text) == [Decimal(e) for e in expected]


@settings(max_examples=200, deadline=None)
@given(st.decimals(allow_nan=False, allow_infinity=False, places=4, min_value=-(10**9), max_value=10**9))
def test_every_decimal_is_read_back(value: Decimal) -> None:
    assert numbers(f"so it is {value:,f}.") == [value]


def independent_quickstart_reward(text: str, answer: str) -> float:
    """The reward of the comparison with other trainers, for whole numbers."""
    found = re.findall(r"-?\d+", text)
    return 0.5 * bool(found and found[-1] == answer) + 0.5 * (text.strip().rstrip(".") == answer)


@pytest.mark.parametrize(
    "text", ["7", " 7.\n", "The answer is 7", "7 apples", "8", "3+4=7", "seven", "", "7 8", "-7", "17", "77", "7..."]
)
def test_numeric_with_halves_is_the_quickstart_reward(text: str) -> None:
    result = score(numeric, NumericOptions(correct_weight=0.5, format_weight=0.5), sample(text, "7"))
    assert result.value == independent_quickstart_reward(text, "7")
    assert result.scores["correct"] + result.scores["format"] == 2 * (result.value or 0.0)


def test_numeric_compares_numbers_not_spellings() -> None:
    options = NumericOptions()
    for text, answer in (("1,000", 1000), ("72.0", "some steps ... #### 72"), ("0.30", 0.3), ("-2", -2)):
        assert score(numeric, options, sample(text, answer)).value == 1.0
    assert score(numeric, options, sample("0.1000001", "0.1")).value == 0.0
    assert score(numeric, NumericOptions(tolerance=1e-6), sample("0.1000001", "0.1")).value == 1.0


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(None, "data.jsonl:4 has no reference answer"), ("seven", "holds no number"), (True, "holds no number")],
)
def test_numeric_without_a_usable_reference_fails(answer: Any, reason: str) -> None:
    result = score(numeric, NumericOptions(), sample("7", answer))
    assert result.value is None
    assert result.failure is not None
    assert reason in result.failure


def test_text_rewards_fail_without_text() -> None:
    for reward, options in ((numeric, NumericOptions()), (exact, ExactOptions())):
        assert "no text" in (score(reward, options, sample(None, "7")).failure or "")


@pytest.mark.parametrize(
    ("options", "text", "answer", "value"),
    [
        ({}, " Paris\n", "Paris", 1.0),
        ({}, "paris", "Paris", 0.0),
        ({"casefold": True}, "STRASSE", "Straße", 1.0),
        ({"strip": False}, " Paris", "Paris", 0.0),
        ({}, "Lyon", ["Paris", "Lyon"], 1.0),
        ({}, "4", 4, 1.0),
        ({"extract": "<answer>(.*?)</answer>"}, "<answer>A</answer> no: <answer>\nB </answer>", "B", 1.0),
        ({"extract": "<answer>(.*?)</answer>"}, "B", "B", 0.0),
        ({"extract": "[A-D]"}, "either A or C", "C", 1.0),
        ({"extract": "x|(y)"}, "x", "", 0.0),
    ],
)
def test_exact(options: dict[str, Any], text: str, answer: Any, value: float) -> None:
    assert score(exact, ExactOptions(**options), sample(text, answer)).value == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>a\nb</think><answer>4</answer>", 1.0),
        (" <think></think>\n<answer>4</answer>\n", 1.0),
        ("<answer>4</answer><think>a</think>", 0.0),
        ("<think>a</think><answer>4</answer> indeed", 0.0),
        ("<think>a<think>b</think><answer>4</answer>", 0.0),
        ("<think>a</think><answer>4</answer><answer>5</answer>", 0.0),
        ("<think>a</think>4", 0.0),
    ],
)
def test_format_by_default_is_think_then_answer(text: str, value: float) -> None:
    assert Format(FormatOptions()).score([sample(text)]) == [RewardResult(value=value)]


def test_format_with_a_pattern_of_ones_own() -> None:
    assert Format(FormatOptions(pattern=r"\d+")).score([sample("a 4")]) == [RewardResult(value=0.0)]
    assert Format(FormatOptions(pattern=r"\d+", match="search")).score([sample("a 4")]) == [RewardResult(value=1.0)]
    with pytest.raises(ValidationError, match="not a valid regular expression: missing \\)"):
        FormatOptions(pattern="(")


@pytest.mark.parametrize(
    ("size", "value"), [(0, 0.0), (5, 0.5), (10, 1.0), (20, 1.0), (21, 0.9), (29, 0.1), (30, 0.0), (99, 0.0)]
)
def test_length_band(size: int, value: float) -> None:
    options = LengthOptions(minimum=10, maximum=20, ramp=10)
    assert score(length, options, sample("x", size=size)).value == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    ("size", "value"), [(0, 0.0), (16384, 0.0), (18432, -0.5), (20480, -1.0), (20481, -1.0), (16385, -1 / 4096)]
)
def test_length_soft_overlong_has_the_papers_values(size: int, value: float) -> None:
    # The paper's setting: 16,384 expected tokens and a cache of 4,096.
    options = LengthOptions(shape="soft_overlong", maximum=20480, ramp=4096)
    assert score(length, options, sample("x", size=size)).value == value


def test_length_steps_units_and_bad_options() -> None:
    assert score(length, LengthOptions(maximum=3), sample("x", size=4)).value == 0.0
    assert score(length, LengthOptions(maximum=3, shape="soft_overlong"), sample("x", size=3)).value == 0.0
    assert score(length, LengthOptions(maximum=3, shape="soft_overlong"), sample("x", size=4)).value == -1.0
    assert score(length, LengthOptions(maximum=3, unit="characters"), sample("abcd", size=1)).value == 0.0
    assert score(length, LengthOptions(maximum=2, unit="words"), sample("a  b\n", size=9)).value == 1.0
    for bad, reason in (
        ({"minimum": 5, "maximum": 4}, "exceeds maximum"),
        ({"shape": "soft_overlong", "minimum": 1, "maximum": 4}, "long samples only"),
        ({"shape": "soft_overlong", "ramp": 5, "maximum": 4}, "exceeds maximum"),
        ({}, "maximum"),
    ):
        with pytest.raises(ValidationError, match=reason):
            LengthOptions(**bad)  # type: ignore[arg-type]
