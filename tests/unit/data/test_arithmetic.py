import itertools
import subprocess
import sys

import pytest
from pydantic import ValidationError

from mmrl_core.data.arithmetic import ArithmeticSource
from mmrl_core.data.options import ArithmeticOptions
from mmrl_core.errors import DataError

EVERYTHING = {"operations": ["+", "-", "*"], "smallest": -3, "largest": 12}


def source(seed: int = 0, **options: object) -> ArithmeticSource:
    made = ArithmeticSource(ArithmeticOptions.model_validate(options), seed)
    made.prepare()
    return made


def expressions(made: ArithmeticSource) -> list[str]:
    return [made.prompt(i).columns["expression"] for i in range(len(made))]


def test_all_holds_every_problem_once_with_the_right_answer() -> None:
    made = source(split="all", **EVERYTHING)
    prompts = [made.prompt(i) for i in range(len(made))]
    assert len(prompts) == 3 * 16 * 16
    assert len({p.question() for p in prompts}) == len(prompts)
    for prompt in prompts:
        assert prompt.answer == str(eval(prompt.columns["expression"]))  # noqa: S307  our own digits


def test_the_question_is_the_filled_template() -> None:
    made = source(
        split="all", smallest=3, largest=3, question_template="Compute {question}, please.", system="Be brief."
    )
    assert made.prompt(0).messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Compute 3 + 3, please."},
    )
    assert source(split="all", smallest=-2, largest=-2).prompt(0).question() == (
        "What is -2 + (-2)? Answer with the number only."
    )


def test_train_and_test_partition_the_problems() -> None:
    train, test = (set(expressions(source(split=s, **EVERYTHING))) for s in ("train", "test"))
    assert not train & test
    assert train | test == set(expressions(source(split="all", **EVERYTHING)))
    assert 0.12 < len(test) / (len(train) + len(test)) < 0.28


def test_a_problem_keeps_its_side_whatever_else_is_asked() -> None:
    train = set(expressions(source(seed=1, split="train", **EVERYTHING)))
    others = [
        source(seed=2, split="test", operations=["*", "+"], smallest=0, largest=40),
        source(seed=3, split="test", question_template="{question} = ?", operations=["-"], smallest=-9, largest=5),
    ]
    for other in others:
        assert not train & set(expressions(other))


def test_swapped_operands_stay_together() -> None:
    test = set(expressions(source(split="test", operations=["+", "*"], largest=30)))
    train = set(expressions(source(split="train", operations=["+", "*"], largest=30)))
    for expression in test:
        left, sign, right = expression.split()
        assert f"{right} {sign} {left}" not in train


def test_membership_follows_an_independent_implementation_of_the_hash() -> None:
    mask = 2**64 - 1

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    assert mix(0) == 0xE220A8397B1DCDAF  # the generator's published first output for seed 0
    expected = set()
    for (number, sign), a, b in itertools.product(enumerate("+-*"), range(-3, 13), range(-3, 13)):
        first, second = (a, b) if sign == "-" else sorted((a, b))
        position = mix(mix(mix(number) ^ (first & mask)) ^ (second & mask)) / 2**64
        if position < 0.3:
            expected.add(f"{a} {sign} {b if b >= 0 else f'({b})'}")
    assert set(expressions(source(split="test", test_fraction=0.3, **EVERYTHING))) == expected


def test_a_new_source_continues_where_the_old_one_stopped() -> None:
    first, again = source(seed=5, **EVERYTHING), source(seed=5, **EVERYTHING)
    far = 3 * len(first) + 11
    assert [again.prompt(i) for i in range(far, far + 30)] == [first.prompt(i) for i in range(far, far + 30)]
    assert first.digest() == again.digest()


def test_the_order_is_the_same_in_another_process() -> None:
    code = (
        "from mmrl_core.data.arithmetic import ArithmeticSource as S\n"
        "from mmrl_core.data.options import ArithmeticOptions as O\n"
        "s = S(O(), 4); s.prepare(); print([s.prompt(i).answer for i in range(200)], s.digest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "77"}
    )
    here = source(seed=4)
    assert done.stdout.strip() == f"{[here.prompt(i).answer for i in range(200)]} {here.digest()}"


def test_the_digest_tells_seeds_and_options_apart() -> None:
    made = [source(), source(seed=1), source(largest=10), source(split="test"), source(system="Hi")]
    assert len({m.digest() for m in made}) == len(made)


@pytest.mark.parametrize(("split", "fraction"), [("test", 0.0), ("train", 1.0)])
def test_an_empty_split_is_an_error(split: str, fraction: float) -> None:
    with pytest.raises(DataError, match=rf"split '{split}' is empty: none of the 100 problems.*test_fraction"):
        source(split=split, test_fraction=fraction)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smallest": 5, "largest": 4}, r"smallest \(5\) is above largest \(4\)"),
        ({"largest": 10**5}, "10,000,200,001 problems"),
        ({"smallest": 2**31, "largest": 2**31}, "below"),
        ({"operations": ["+", "+"]}, "names one twice"),
        ({"operations": []}, "at least 1"),
        ({"operations": ["/"]}, "'\\*'"),
        ({"question_template": "What?"}, "must contain {question}"),
        ({"question_template": "{question} {answer}"}, "{answer} is not known here"),
        ({"test_fraction": 1.5}, "less than or equal to 1"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ArithmeticOptions.model_validate(options)
