"""Who watches a run: the writers that the recipe names, and lifecycle hooks of installed plugins."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmrl_core.contracts import Sample
from mmrl_core.errors import ObserverError
from mmrl_core.hookspecs import LifecycleHooks
from mmrl_core.plugins import Plugins, Selected
from mmrl_core.recipe import Recipe

log = logging.getLogger("mmrl.observers")

_HOOKS = [name for name in vars(LifecycleHooks) if name.startswith("mmrl_")]


class RunObservers:
    """Calls every observer's lifecycle hooks, one by one.

    A writer that the recipe names is part of the run: its failure stops the run with an ObserverError. An installed
    plugin that nobody named only watches: its failure is one WARNING with the traceback, and it watches no more.
    """

    def __init__(self, plugins: Plugins, writers: Sequence[Selected]) -> None:
        self._named = {id(w): (s.found.name, w) for s in writers for w in [s.create()]}
        self._observers: list[tuple[str, Any]] = list(self._named.values())
        self._observers += [
            (manager_name, plugin)
            for manager_name, plugin in plugins.manager.list_name_plugin()
            if plugin is not None and any(hasattr(plugin, hook) for hook in _HOOKS)
        ]

    def run_start(self, recipe: Recipe, run_dir: Path, first_step: int) -> None:
        """See LifecycleHooks.mmrl_run_start."""
        self._each("mmrl_run_start", recipe=recipe, run_dir=str(run_dir), first_step=first_step)

    def step_end(self, step: int, metrics: Mapping[str, float], samples: Sequence[Sample]) -> None:
        """See LifecycleHooks.mmrl_step_end."""
        self._each("mmrl_step_end", step=step, metrics=metrics, samples=samples)

    def evaluation_end(self, step: int, metrics: Mapping[str, float], samples: Sequence[Sample]) -> None:
        """See LifecycleHooks.mmrl_evaluation_end."""
        self._each("mmrl_evaluation_end", step=step, metrics=metrics, samples=samples)

    def run_end(self, summary: Mapping[str, Any]) -> None:
        """See LifecycleHooks.mmrl_run_end."""
        self._each("mmrl_run_end", summary=summary)

    def _each(self, hook: str, **arguments: Any) -> None:
        for name, observer in list(self._observers):
            function = getattr(observer, hook, None)
            if function is None:
                continue
            try:
                function(**{k: v for k, v in arguments.items() if k in _parameters(function)})
            except Exception as error:
                if id(observer) in self._named:
                    raise ObserverError(f"writer {name!r} failed in {hook}: {type(error).__name__}: {error}") from error
                self._observers.remove((name, observer))
                log.warning("plugin %s failed in %s and watches no more:\n%s", name, hook, traceback.format_exc())


class NoObservers:
    """For ranks other than 0."""

    def run_start(self, recipe: Recipe, run_dir: Path, first_step: int) -> None:
        """Nothing."""

    def step_end(self, step: int, metrics: Mapping[str, float], samples: Sequence[Sample]) -> None:
        """Nothing."""

    def evaluation_end(self, step: int, metrics: Mapping[str, float], samples: Sequence[Sample]) -> None:
        """Nothing."""

    def run_end(self, summary: Mapping[str, Any]) -> None:
        """Nothing."""


def _parameters(function: Callable[..., Any]) -> set[str]:
    """A hook implementation may take fewer arguments than the hook passes."""
    import inspect

    return set(inspect.signature(function).parameters)
