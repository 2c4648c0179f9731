from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from math_verify.errors import TimeoutException

import mmrl_core.rewards.math as module
from mmrl_core.contracts import Prompt, RewardResult, Sample
from mmrl_core.errors import RewardError
from mmrl_core.rewards.math import MathReward, last_boxed
from mmrl_core.rewards.options import MathOptions


def score(text: str | None, answer: Any, **options: Any) -> RewardResult:
    prompt = Prompt(index=0, text="q", answer=answer, origin="data.jsonl:9")
    reward = MathReward(MathOptions(**options))
    reward.setup("cpu")
    (result,) = reward.score([Sample(sample_id=0, group_id=0, prompt=prompt, text=text)])
    return result


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{4}", "4"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{3} and \boxed{4", "3"),
        (r"\boxed{\boxed{5}", "5"),
        (r"\boxed 4", None),
        ("4", None),
    ],
)
def test_last_boxed(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("given", "answer", "value"),
    [
        (r"\frac{1}{2}", "0.5", 1.0),
        ("0.5", r"\frac{1}{2}", 1.0),
        (r"\dfrac12", r"$\frac{1}{2}$", 1.0),
        ("x^2+2x+1", "(x+1)^2", 1.0),
        ("(1,2)", "(1, 2)", 1.0),
        ("(2,1)", "(1, 2)", 0.0),
        ("1,000", 1000, 1.0),
        (r"\{2, 1\}", r"\{1,2\}", 1.0),
        ("x=3", "3", 1.0),
        (r"10\%", r"10\%", 1.0),
        (r"\text{east}", r"\text{east}", 1.0),
        ("A", "A", 1.0),
        ("B", "A", 0.0),
        (r"2\sqrt{3}", r"\sqrt{12}", 1.0),
        ("3", r"we get \boxed{3}", 1.0),
        ("4", "3", 0.0),
        ("}{", "3", 0.0),
        (r"\frac{", "3", 0.0),
        ("", "3", 0.0),
    ],
)
def test_boxed_answers_are_compared_as_mathematics(given: str, answer: Any, value: float) -> None:
    result = score(rf"Let me think. 7 is wrong. Therefore \boxed{{{given}}}.", answer)
    assert (result.value, result.failure) == (value, None)
    assert result.scores["correct"] == value


def test_an_answer_without_a_box() -> None:
    assert score("the answer is 4", "4") == RewardResult(value=0.0, scores={"correct": 0.0, "boxed": 0.0})
    loose = score("the answer is 4", "4", require_boxed=False)
    assert loose == RewardResult(value=1.0, scores={"correct": 1.0, "boxed": 0.0})
    assert score(r"3 or \boxed{4}", "4", require_boxed=False).scores == {"correct": 1.0, "boxed": 1.0}


def test_listing_many_answers_is_not_right() -> None:
    assert score(r"\boxed{3} \boxed{4}", "3").value == 0.0
    assert score(r"\boxed{3, 4, 5}", "3").value == 0.0


@pytest.mark.parametrize("answer", ["", "   "])
def test_an_unreadable_reference_is_a_failure(answer: str) -> None:
    result = score(r"\boxed{3}", answer)
    assert result.value is None
    assert "cannot read the reference" in (result.failure or "")
    assert "data.jsonl:9" in (result.failure or "")


def test_missing_text_or_reference_is_a_failure() -> None:
    assert score(None, "3").value is None
    assert "data.jsonl:9 has no reference answer" in (score(r"\boxed{3}", None).failure or "")


def test_a_comparison_that_takes_too_long_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    from math_verify import grader

    entered = []

    def endless(*_: Any, **__: Any) -> bool:
        entered.append(time.monotonic())
        time.sleep(30)
        return False

    monkeypatch.setattr(grader, "sympy_expr_eq", endless)
    result = score(r"\boxed{y+1}", "y+2", timeout_s=1)
    assert 0.9 < time.monotonic() - entered[0] < 10
    assert (result.value, result.failure) == (None, "math-verify timed out after 1 s")


def test_a_late_reading_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: Any, **__: Any) -> Any:
        raise TimeoutException

    monkeypatch.setattr(module, "parse", late)
    assert score(r"\boxed{17771}", "17771").failure == "math-verify timed out after 5 s"


def test_outside_the_main_thread_it_says_what_to_do() -> None:
    raised: list[Exception] = []

    def attempt(call: Any) -> None:
        try:
            call()
        except RewardError as error:
            raised.append(error)

    reward = MathReward(MathOptions())
    for call in (lambda: reward.setup("cpu"), lambda: reward.score([])):
        thread = threading.Thread(target=attempt, args=(call,))
        thread.start()
        thread.join()
    assert ["run: worker" in str(e) for e in raised] == [True, True]
