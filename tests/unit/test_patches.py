"""The Patch facility, on a library that exists only here."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from mmrl_core import Patch
from mmrl_core.errors import PatchError
from mmrl_core.patches import Applied, apply, verdict

NUMPY = importlib.metadata.version("numpy")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module `toy_library` of the distribution numpy, so to say, and one that imported from it by name."""
    toy, user = ModuleType("toy_library"), ModuleType("toy_user")

    def area(x: int) -> str:
        return f"area {x}"

    class Base:
        def inherited(self) -> str:
            return "base"

    class Shape(Base):
        @classmethod
        def named(cls) -> str:
            return cls.__name__

        @property
        def sides(self) -> int:
            return 4

    toy.area, toy.Shape, toy.Base = area, Shape, Base  # type: ignore[attr-defined]
    user.area = area  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_library", toy)
    monkeypatch.setitem(sys.modules, "toy_user", user)
    return toy


def patch(*targets: str, name: str = "p", replacement: str = "wrap", **fields: Any) -> Patch:
    return Patch(
        name=name,
        targets=targets,
        replacement=f"toy_factories:{replacement}",
        reason="for the test",
        distribution=fields.pop("distribution", "numpy"),
        versions=fields.pop("versions", ">=1"),
        **fields,
    )


@pytest.fixture(autouse=True)
def factories(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("toy_factories")

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *a: f"patched {original(*a)}"

    def shout(code: Any) -> Any:
        return code.replace(co_consts=tuple("AREA " if c == "area " else c for c in code.co_consts))

    def keep_kind(original: classmethod[Any, Any, str]) -> classmethod[Any, Any, str]:
        return classmethod(lambda cls: f"patched {original.__func__(cls)}")

    def fail(original: object) -> object:
        raise ZeroDivisionError("a factory that fails")

    for function in (wrap, shout, keep_kind, fail):
        setattr(module, function.__name__, function)
    monkeypatch.setitem(sys.modules, "toy_factories", module)


def test_module_attribute_is_replaced_and_restored(library: Any) -> None:
    before = library.area
    with apply([patch("toy_library:area")], device="cpu") as handle:
        assert library.area(3) == "patched area 3"
        assert [p.name for p in handle.patches] == ["p"]
    assert library.area is before
    handle.revert()  # twice is once
    assert library.area is before


def test_descriptors_stay_what_they_are(library: Any) -> None:
    before = dict(vars(library.Shape))
    change = patch("toy_library:Shape.named", replacement="keep_kind")
    with apply([change], device="cpu"):
        assert library.Shape.named() == "patched Shape"
        assert isinstance(vars(library.Shape)["named"], classmethod)
    assert dict(vars(library.Shape)) == before


def test_what_was_inherited_is_inherited_again(library: Any) -> None:
    with apply([patch("toy_library:Shape.inherited")], device="cpu"):
        assert library.Shape().inherited() == "patched base"
        assert library.Base().inherited() == "base"
    assert "inherited" not in vars(library.Shape)
    assert library.Shape().inherited() == "base"


def test_code_reaches_those_who_imported_by_name(library: Any) -> None:
    user, before = sys.modules["toy_user"], library.area.__code__
    with apply([patch("toy_library:area.__code__", replacement="shout")], device="cpu"):
        assert user.area(1) == "AREA 1"
    assert user.area(1) == "area 1"
    assert library.area.__code__ is before


def test_applying_twice_wraps_once_and_the_last_holder_reverts(library: Any) -> None:
    change = patch("toy_library:area")
    first, second = apply([change], device="cpu"), apply([change], device="cpu")
    assert library.area(1) == "patched area 1"
    first.revert()
    first.revert()
    assert library.area(1) == "patched area 1"
    second.revert()
    assert library.area(1) == "area 1"


def test_patches_of_one_target_stack_and_unwind(library: Any) -> None:
    before = library.area
    inner, outer = patch("toy_library:area"), patch("toy_library:area", name="outer")
    with apply([inner, outer], device="cpu"):
        assert library.area(1) == "patched patched area 1"
    assert library.area is before


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"versions": f"<{NUMPY}"}, f"numpy {NUMPY} is not in <{NUMPY}"),
        ({"distribution": "no-such-distribution"}, "no-such-distribution is not installed"),
        ({"devices": ("npu", "cuda")}, "it is for device npu or cuda, not cpu"),
    ],
)
def test_what_does_not_fit_is_left_alone_and_says_why(library: Any, fields: dict[str, Any], said: str) -> None:
    change = patch("toy_library:area", **fields)
    assert verdict(change, "cpu").reason == said
    with apply([change], device="cpu") as handle:
        assert library.area(1) == "area 1"
        assert handle.skipped == {"p": said}
        assert handle.patches == []


@pytest.mark.parametrize("bad", ["toy_library:no.such", "toy_library:Shape.gone", "no_such_module:x"])
def test_missing_target_undoes_everything(library: Any, bad: str) -> None:
    before = library.area
    good = patch("toy_library:area", name="good")
    with pytest.raises(PatchError, match=rf"patch p: {bad} does not exist with numpy {NUMPY}.*declared for >=1"):
        apply([good, patch("toy_library:Shape.named", bad, replacement="keep_kind")], device="cpu")
    assert library.area is before
    assert library.Shape.named() == "Shape"


def test_factory_that_fails_undoes_everything(library: Any) -> None:
    before = library.area
    with pytest.raises(ZeroDivisionError):
        apply([patch("toy_library:area"), patch("toy_library:Shape.sides", name="q", replacement="fail")], device="cpu")
    assert library.area is before


def test_revert_does_not_undo_the_change_of_somebody_else(library: Any) -> None:
    original = library.area
    handle: Applied = apply([patch("toy_library:area")], device="cpu")
    ours, theirs = library.area, lambda x: "theirs"
    library.area = theirs
    with pytest.raises(PatchError, match="toy_library:area was replaced again"):
        handle.revert()
    assert library.area is theirs
    library.area = ours
    handle.revert()
    assert library.area is original


PLUGIN = """
from mmrl_core import Diagnosis, Patch, hookimpl
mmrl_api = 1
@hookimpl
def mmrl_patches():
    common = dict(targets=("toy_library:area",), replacement="no_such_factories:f", reason="it hurts")
    return [
        Patch(name="fits", distribution="numpy", versions=">=1", upstream="https://example.org/1", **common),
        Patch(name="elsewhere", distribution="numpy", versions=">=1", devices=("abacus",), **common),
        Patch(name="outdated", distribution="numpy", versions="<0.1", **common),
    ]
@hookimpl
def mmrl_diagnoses():
    return [Diagnosis(name="luck", probe="lucky:luck"), Diagnosis(name="bad", probe="lucky:crash")]
"""
LUCK = """
from mmrl_core import Probe
def luck(): return Probe(available=False, reason="none left", cure="wait")
def crash(): raise KeyError("oops")
"""


def test_doctor_lists_patches_and_diagnoses(site: Any) -> None:
    site.install("patchwork", PLUGIN, modules={"lucky": LUCK})
    done = site.mmrl("doctor", "--json", environment={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    found = {p["name"]: p for p in report["patches"] if p["distribution"] == "patchwork"}
    assert {n: p["applies"] for n, p in found.items()} == {"fits": True, "elsewhere": False, "outdated": False}
    assert found["fits"]["devices"] == ["cpu"]
    assert found["elsewhere"]["verdict"] == "it is for device abacus"
    assert found["outdated"]["verdict"] == f"numpy {NUMPY} is not in <0.1"
    said = {d["name"]: d for d in report["diagnoses"] if d["distribution"] == "patchwork"}
    assert (said["luck"]["reason"], said["luck"]["cure"]) == ("none left", "wait")
    assert "KeyError" in said["bad"]["reason"]
    text = site.mmrl("doctor").stdout
    assert f"fits (patchwork) applies on cpu: numpy {NUMPY} is in >=1" in text
    assert "why: it hurts (https://example.org/1)" in text
    assert "missing luck (patchwork): none left\n          cure: wait" in text


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('versions=">=1"', 'versions="new"', "versions 'new' is not a version range"),
        ('"toy_library:area"', '"toy_library.area"', "'toy_library.area' is not of the form"),
        ('name="outdated"', 'name="fits"', "declares 'fits' more than once"),
        ("return [\n        Patch", "return ['x',\n        Patch", "each item is a Patch"),
    ],
)
def test_wrong_declaration_breaks_the_plugin_with_a_reason(site: Any, old: str, new: str, said: str) -> None:
    site.install("patchwork", PLUGIN.replace(old, new))
    done = site.mmrl("plugins", "--json")
    (row,) = [r for r in json.loads(done.stdout) if r["distribution"] == "patchwork"]
    assert row["status"] == "broken"
    assert said in row["reason"]


def test_a_replacement_takes_back_what_it_did_to_objects(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its `mmrl_undo` is called once, by the last handle, while the replacement still stands."""
    standing: list[Any] = []

    def tracking(original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(x: int) -> Any:
            return original(x)

        replacement.mmrl_undo = lambda: standing.append(library.area)  # type: ignore[attr-defined]
        return replacement

    monkeypatch.setattr(sys.modules["toy_factories"], "tracking", tracking, raising=False)
    first = apply([patch("toy_library:area", replacement="tracking")], device="cpu")
    second = apply([patch("toy_library:area", replacement="tracking")], device="cpu")
    during = library.area
    second.revert()
    assert standing == []
    first.revert()
    assert standing == [during]
    assert library.area is not during
