import pytest

from mmrl_core.data.placeholders import fill, placeholder_names


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("What is {q}?", "What is 3 {q} {{x}}?"),
        (r"{q} Put it in \boxed{}.", r"3 {q} {{x}} Put it in \boxed{}."),
        ("{{q}} is {a.b}", "{q} is 7"),
        ("{ q } {q:>3} {q!r} {0}", "{ q } {q:>3} {q!r} {0}"),
    ],
)
def test_only_plain_names_are_filled_and_once(template: str, expected: str) -> None:
    values = {"q": "3 {q} {{x}}", "a.b": 7}
    assert fill(template, values.__getitem__) == expected


def test_names_are_listed_without_escapes() -> None:
    assert placeholder_names(r"{a} {{b}} {c.d} \boxed{} {a}") == ["a", "c.d", "a"]
