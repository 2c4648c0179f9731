"""Fixtures for tests of plugins: installed distributions that are a folder with a .dist-info on the path."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest


class FakeSite:
    """A folder of fake installed distributions, and Python processes that see it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(
        self,
        name: str,
        code: str,
        *,
        version: str = "1.0",
        requires: Sequence[str] = (),
        entry: str | None = None,
        modules: Mapping[str, str] | None = None,
    ) -> None:
        """A distribution with one plugin module (and further `modules`); `entry` is its entry point's value."""
        module = name.replace("-", "_") + "_plugin"
        (self.folder / f"{module}.py").write_text(textwrap.dedent(code))
        for other, text in (modules or {}).items():
            (self.folder / f"{other}.py").write_text(textwrap.dedent(text))
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {r}" for r in requires)]) + "\n")
        (info / "entry_points.txt").write_text(f"[mmrl]\n{name} = {entry or module}\n")

    def python(
        self, *arguments: str, environment: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run Python with these distributions installed."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith("MMRL_") and k != "RANK"}
        variables = {**clean, "PYTHONPATH": str(self.folder), **(environment or {})}
        command = [sys.executable, *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=variables, cwd=cwd, timeout=120)

    def mmrl(self, *arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run the command `mmrl`, in a folder beside the distributions."""
        work = self.folder.parent / "work"
        work.mkdir(exist_ok=True)
        return self.python("-m", "mmrl_core.cli.main", *arguments, environment=environment, cwd=work)


@pytest.fixture
def site(tmp_path: Path) -> FakeSite:
    """No fake distribution yet."""
    folder = tmp_path / "site"
    folder.mkdir()
    return FakeSite(folder)


LAB = """
from mmrl_core import Component, hookimpl

mmrl_api = 1

@hookimpl
def mmrl_training_backends():
    return [Component(name="toy", summary="A toy backend", target="lab_parts:Backend",
                      options="lab_options:ToyOptions")]

@hookimpl
def mmrl_rollout_engines():
    return [Component(name="dice", summary="Random tokens", target="lab_parts:Engine")]

@hookimpl
def mmrl_policies():
    return [Component(name="words", summary="A toy policy", target="lab_parts:Words",
                      options="lab_options:WordsOptions", sampling="lab_options:WordsSampling")]

@hookimpl
def mmrl_rewards():
    return [Component(name="brief", summary="Short answers", target="lab_parts:brief"),
            Component(name="never", summary="Cannot run", target="lab_parts:brief", probe="lab_options:never")]

@hookimpl
def mmrl_prompt_sources():
    return [Component(name="list", summary="A list", target="lab_parts:List", options="lab_options:ListOptions")]

@hookimpl
def mmrl_writers():
    return [Component(name="paper", summary="Nothing", target="lab_parts:Paper")]
"""

LAB_OPTIONS = '''
from typing import Any, ClassVar
from mmrl_core.hookspecs import Probe
from mmrl_core.recipe import Positive, Spec

class Inner(Spec):
    depth: int = 3
    """How deep."""

class ToyOptions(Spec):
    shards: Positive = 2
    """How many."""
    offload: bool = False
    """Whether."""
    inner: Inner = Inner()
    """Nested."""

class WordsOptions(Spec):
    template: str | None = None
    """A name."""

class WordsSampling(Spec):
    evaluation_defaults: ClassVar[dict[str, Any]] = {"temperature": 0.0}
    max_new_tokens: Positive
    """Limit."""
    temperature: float = 1.0
    """Heat."""

class ListOptions(Spec):
    path: str
    """A file."""

def never():
    return Probe(available=False, reason="no such luck", cure="pip install luck")
'''

LAB_RECIPE = """\
name: trial
run_dir: runs/trial
model:
  path: some/model
  policy: words
backend: toy
rollout: dice
sampling:
  max_new_tokens: 8
data:
  name: list
  path: prompts.jsonl
rewards:
  - brief
algorithm:
  steps: 2
  prompts_per_step: 4
  samples_per_prompt: 2
writers: [paper]
"""


@pytest.fixture
def lab(site: FakeSite) -> FakeSite:
    """A distribution `lab` with one component of each kind but device and launcher, and `trial.yaml` that names them.
    Its `lab_parts` cannot be imported: what only checks recipes must not try."""
    site.install(
        "lab", LAB, modules={"lab_options": LAB_OPTIONS, "lab_parts": "raise ImportError('lab_parts is heavy')"}
    )
    work = site.folder.parent / "work"
    work.mkdir()
    (work / "trial.yaml").write_text(LAB_RECIPE)
    return site
