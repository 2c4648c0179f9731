"""Checks of a component's declaration, and how a conformance class finds and creates its component. No torch here."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from mmrl_core.hookspecs import Component, Probe
from mmrl_core.plugins import Found, Selected, import_string, load_plugins

PROBE_LIMIT_S = 0.5
"""A probe's answer may take so long, or `mmrl plugins` would be slow."""

_IMPORT_WITHOUT_TORCH = """
import importlib.abc, json, sys

class NoTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ImportError("torch is not importable in this check: options must be checked anywhere")

sys.meta_path.insert(0, NoTorch())
from mmrl_core.plugins import import_string
for dotted in sys.argv[1:]:
    import_string(dotted, "options")
print(json.dumps(sorted(sys.modules)))
"""

_TIME_PROBE = """
import dataclasses, json, sys, time
from mmrl_core.plugins import import_string

start = time.perf_counter()
answer = import_string(sys.argv[1], "probe")()
seconds = time.perf_counter() - start
answer = dataclasses.asdict(answer) if dataclasses.is_dataclass(answer) else repr(answer)
print(json.dumps([seconds, "torch" in sys.modules, answer]))
"""


def run_python(
    *arguments: str, environment: Mapping[str, str] | None = None, timeout_s: float = 120
) -> subprocess.CompletedProcess[str]:
    """A fresh Python with this process's `sys.path`, one compute thread and none of a launcher's variables."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "MMRL_STORE")
    clean = {name: value for name, value in os.environ.items() if name not in launcher}
    path = os.pathsep.join(entry for entry in sys.path if entry)
    variables = {**clean, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(environment or {})}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=variables, timeout=timeout_s, check=False
    )


class ComponentConformance:
    """The declaration. Base of every other conformance class, which sets `kind`."""

    kind: ClassVar[str]
    """`device`, `backend`, `rollout`, `reward`, `policy`, `launcher`, `prompt source`, `writer`, `weight format`,
    `advantage estimator` or `policy loss`."""
    component: ClassVar[str | Component]
    """A word that a recipe could say (`mine`, `my-distribution:mine`), or the `Component` itself for a plugin whose
    distribution is not installed while it is being tested."""
    options: ClassVar[Mapping[str, Any]] = {}
    """Its options, as a recipe gives them."""

    # ---------------------------------------------------------------------------------------------------- how to use it

    @classmethod
    def found(cls) -> Found:
        """The component and its distribution. Raises PluginError when no installed plugin declares it."""
        if isinstance(cls.component, Component):
            return Found(kind=cls.kind, component=cls.component, distribution="(not installed)", version="0")
        return load_plugins().get(cls.kind, cls.component)

    @classmethod
    def selected(cls, options: Mapping[str, Any] | None = None) -> Selected:
        """With validated options: the class's own, overridden by `options`."""
        found = cls.found()
        given = {**cls.options, **(options or {})}
        if found.component.options is None:
            assert not given, f"{found.name} declares no options model, but the test gives options {given}"
            return Selected(found=found, options=None)
        model = import_string(found.component.options, f"options of {found.name}")
        return Selected(found=found, options=model.model_validate(given))

    @classmethod
    def make_options(cls, folder: Path) -> Mapping[str, Any]:
        """Options that need files: write those into `folder` and return the options. By default `options`."""
        return cls.options

    @classmethod
    def require_available(cls) -> None:
        """Skip the calling test with the probe's reason when the component cannot run on this machine."""
        probe = cls.found().probe()
        if not probe.available:
            pytest.skip(f"{cls.kind} {cls.found().name} cannot run here: {probe.reason}. {probe.cure}")

    # ---------------------------------------------------------------------------------------------------------- checks

    def test_declaration_summary_is_one_line(self) -> None:
        """`mmrl plugins` shows one row a component."""
        summary = self.found().component.summary
        assert summary.strip(), "the summary is empty"
        assert summary == summary.strip(), "the summary begins or ends with white space"
        assert "\n" not in summary, "the summary has more than one line"
        assert len(summary) <= 100, f"the summary has {len(summary)} characters; at most 100 fit a row"

    def test_declaration_options_need_no_torch(self) -> None:
        """Recipes are checked on machines without torch, and in milliseconds: options modules may not import it."""
        component = self.found().component
        modules = [dotted for dotted in (component.options, component.sampling) if dotted is not None]
        done = _import_without_torch(tuple(modules), tuple(sys.path))
        assert done.returncode == 0, done.stderr
        assert "torch" not in json.loads(done.stdout)

    def test_declaration_every_option_is_documented(self) -> None:
        """The recipe reference is generated from the docstrings below the fields; unknown fields are refused."""
        from mmrl_core.recipe import Spec

        component = self.found().component
        for dotted in (component.options, component.sampling):
            if dotted is None:
                continue
            model = import_string(dotted, "options")
            assert isinstance(model, type), f"{dotted} is not a class"
            assert issubclass(model, Spec), f"{dotted} must derive from mmrl_core.recipe.Spec"
            assert model.__doc__, f"{dotted} has no docstring"
            bare = [name for name, field in model.model_fields.items() if not field.description]
            assert not bare, f"{dotted}: no docstring below the fields {bare}"

    def test_declaration_probe_is_quick_and_light(self) -> None:
        """Listing components answers at once: a probe imports no torch and never raises."""
        component = self.found().component
        if component.probe is None:
            return  # it declares itself available everywhere; the import below then has to work
        seconds, torch_imported, answer = _probe_in_fresh_process(component.probe, tuple(sys.path))
        assert not torch_imported, f"{component.probe} imported torch only to answer"
        assert seconds < PROBE_LIMIT_S, f"{component.probe} took {seconds:.2f} s; at most {PROBE_LIMIT_S} s"
        assert isinstance(answer, dict), f"{component.probe} returned {answer}; it must return a Probe"
        probe = Probe(**answer)
        if not probe.available:
            assert probe.reason.strip(), "a probe that says no says why"
            assert probe.cure.strip(), "a probe that says no says what to do"

    def test_declaration_target_imports_or_the_probe_says_why_not(self) -> None:
        """What a probe calls available can be imported; otherwise a user meets a traceback instead of a reason."""
        found = self.found()
        if found.probe().available:
            assert callable(found.load()), f"{found.component.target} is not callable"

    def test_declaration_options_survive_the_recipe(self, tmp_path: Path) -> None:
        """Options go through the run folder's recipe.yaml: plain values, and equal when read again."""
        selected = self.selected(self.make_options(tmp_path))
        if selected.options is not None:
            plain = selected.options.model_dump(mode="json")
            assert type(selected.options).model_validate(plain) == selected.options


@functools.cache
def _import_without_torch(modules: tuple[str, ...], _path: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Once for all classes that check one component; `_path` is the `sys.path` of the process."""
    return run_python("-c", _IMPORT_WITHOUT_TORCH, *modules)


@functools.cache
def _probe_in_fresh_process(probe: str, _path: tuple[str, ...]) -> tuple[float, bool, Any]:
    """(seconds, whether torch was imported, the answer). The better of two runs: machines are shared."""
    answers: list[tuple[float, bool, Any]] = []
    for _ in range(2):
        done = run_python("-c", _TIME_PROBE, probe)
        assert done.returncode == 0, done.stderr
        answers.append(tuple(json.loads(done.stdout)))
        if answers[-1][0] < PROBE_LIMIT_S:
            break
    return min(answers, key=lambda answer: answer[0])


def mismatches(pairs: Sequence[tuple[Any, Any]]) -> list[tuple[int, Any, Any]]:
    """(position, left, right) of the pairs that differ, for messages."""
    return [(i, a, b) for i, (a, b) in enumerate(pairs) if a != b]
