"""`WriterConformance`: what the core relies on in a metric writer. Imports no torch."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pluggy
import pytest

from mmrl_core.contracts import Prompt, Sample
from mmrl_core.hookspecs import PROJECT, LifecycleHooks
from mmrl_core.recipe import Recipe
from mmrl_core.testing.components import ComponentConformance
from mmrl_core.testing.tiny import tiny_recipe

STEPS = 5
SUMMARY: Mapping[str, Any] = MappingProxyType(
    {"outcome": "finished", "steps": STEPS, "seconds": 12.5, "first_reward": 0.1, "last_reward": None, "eval": None}
)


def step_metrics(step: int) -> Mapping[str, float]:
    """What a step has to say; now and then a value that is not finite."""
    return MappingProxyType(
        {
            "grpo/score/mean": 0.1 * step,
            "timing/all": 1.5,
            "perf/tokens": 1000.0,
            "grad_norm": math.nan if step == 2 else math.inf if step == 3 else 0.5,
            "actor/skipped_updates": float(step == 2),
        }
    )


def evaluation_metrics() -> Mapping[str, float]:
    """What a held-out evaluation has to say."""
    return MappingProxyType({"eval/score/mean": 0.25, "eval/prompts": 2.0})


def odd_samples() -> list[Sample]:
    """Samples whose text looks like markup, is empty, or is missing; images and videos, tiny and of odd sizes."""
    prompt = Prompt(index=0, messages=({"role": "user", "content": "What is [red]*2+2*[/red]?"},), answer="4")
    texts = ("[bold]4", "", None, "</s> \x00 ∞ \N{GRINNING FACE}", "line\n" * 3)
    written = [Sample(sample_id=i, group_id=0, prompt=prompt, text=text) for i, text in enumerate(texts)]
    drawn = Prompt(index=1, text="[i]a red fox[/i], \N{CJK UNIFIED IDEOGRAPH-72D0} " + "and another " * 50)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 41, 7, 3), dtype=np.uint8)
    pictures: list[dict[str, Any]] = [{"image": pixels[0]}, {"image": pixels[0, :1, :1]}, {"video": pixels}]
    return written + [
        Sample(sample_id=len(texts) + i, group_id=1, prompt=drawn, **picture) for i, picture in enumerate(pictures)
    ]


def fingerprint(samples: Sequence[Sample]) -> str:
    """Changes when anything in the samples does, pixels included."""
    return repr([(s, *(p.tobytes() for p in (s.image, s.video) if p is not None)) for s in samples])


class WriterConformance(ComponentConformance):
    """Subclass it as `Test...` and name the `component`. Override `steps_written` to check what is left behind."""

    kind = "writer"

    @classmethod
    def steps_written(cls, run_dir: Path) -> Sequence[int] | None:
        """The steps that a reader of the finished run sees, in order; None: not compared (a terminal, a service)."""
        return None

    @classmethod
    def create(cls) -> Any:
        """A new writer."""
        cls.require_available()
        return cls.selected().create()

    @classmethod
    def play(
        cls,
        writer: Any,
        run_dir: Path,
        first: int,
        last: int,
        summary: Mapping[str, Any] | None,
        samples: Sequence[Sample] | None = None,
    ) -> None:
        """The lifecycle of one session; without a summary the process died."""
        samples = odd_samples() if samples is None else samples
        recipe = Recipe.model_validate(tiny_recipe("a/model", run_dir, algorithm={"steps": STEPS}))
        manager = pluggy.PluginManager(PROJECT)
        manager.add_hookspecs(LifecycleHooks)
        manager.register(writer)
        manager.check_pending()
        run_dir.mkdir(parents=True, exist_ok=True)
        manager.hook.mmrl_run_start(recipe=recipe, run_dir=str(run_dir), first_step=first)
        if first == 1:
            manager.hook.mmrl_evaluation_end(step=0, metrics=evaluation_metrics(), samples=samples)
        for step in range(first, last + 1):
            if step % 2 == 0:
                manager.hook.mmrl_evaluation_end(step=step, metrics=evaluation_metrics(), samples=samples)
            manager.hook.mmrl_step_end(step=step, metrics=step_metrics(step), samples=samples)
        if summary is not None:
            manager.hook.mmrl_run_end(summary=summary)

    def test_hooks_are_marked_and_take_what_is_passed(self) -> None:
        """The loop calls lifecycle hooks by name with these arguments only; a mistyped one would never be called."""
        writer = self.create()
        specs = {name for name in vars(LifecycleHooks) if name.startswith("mmrl_")}
        implemented = {name for name, _ in inspect.getmembers(writer, inspect.ismethod) if name.startswith("mmrl_")}
        assert implemented, "it implements no lifecycle hook"
        assert implemented <= specs, f"no such hook: {sorted(implemented - specs)}"
        manager = pluggy.PluginManager(PROJECT)
        manager.add_hookspecs(LifecycleHooks)
        unmarked = [name for name in implemented if manager.parse_hookimpl_opts(writer, name) is None]
        assert not unmarked, f"not marked with @hookimpl: {unmarked}"
        manager.register(writer)
        manager.check_pending()

    def test_whole_run(self, tmp_path: Path) -> None:
        """start, an evaluation, steps, end; values that are not finite and odd samples are no reason to stop a run.
        What it is given is read-only, and stays as it was."""
        samples = odd_samples()
        before = fingerprint(samples)
        self.play(self.create(), tmp_path / "run", 1, STEPS, SUMMARY, samples)
        assert fingerprint(samples) == before, "a writer may not change samples"
        self._compare(tmp_path / "run", range(1, STEPS + 1))

    def test_resumed_run(self, tmp_path: Path) -> None:
        """The process died after step 4, the checkpoint is of step 2: a new writer goes on at step 3, and a reader
        sees every step once."""
        self.play(self.create(), tmp_path / "run", 1, 4, None)
        self.play(self.create(), tmp_path / "run", 3, STEPS, SUMMARY)
        self._compare(tmp_path / "run", range(1, STEPS + 1))

    @pytest.mark.parametrize("outcome", ["failed", "stopped"])
    def test_run_that_ends_early(self, tmp_path: Path, outcome: str) -> None:
        """The summary of a failed run holds its outcome and little else; a run may end before its first step."""
        self.play(self.create(), tmp_path / "early", 1, 0, {"outcome": outcome, "seconds": 0.1})
        self.play(self.create(), tmp_path / "later", 1, 2, {"outcome": outcome, "run_dir": "x", "seconds": 0.1})
        self._compare(tmp_path / "later", range(1, 3))

    def test_two_runs_do_not_mix(self, tmp_path: Path) -> None:
        """Files go to the run folder."""
        self.play(self.create(), tmp_path / "one", 1, 2, SUMMARY)
        self.play(self.create(), tmp_path / "two", 1, 3, SUMMARY)
        self._compare(tmp_path / "one", range(1, 3))

    def _compare(self, run_dir: Path, steps: range) -> None:
        written = self.steps_written(run_dir)
        if written is not None:
            assert list(written) == list(steps)
