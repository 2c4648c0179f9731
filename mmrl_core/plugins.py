"""Discovery, declaration and selection of components.

We iterate the entry points ourselves instead of letting pluggy do it, so that one broken plugin never hides another
and every component is attributed to its distribution. This module imports no torch.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import json
import logging
import os
import re
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pluggy
from packaging.utils import canonicalize_name

from mmrl_core.errors import PluginError, RecipeError, nearest
from mmrl_core.hookspecs import (
    ENTRY_POINT_GROUP,
    PROJECT,
    Component,
    DeclaringHooks,
    Diagnosis,
    LifecycleHooks,
    Patch,
    Probe,
)
from mmrl_core.plugin_checks import CORE_DISTRIBUTION, check_api, check_hooks, check_requirement, declared
from mmrl_core.recipe import Choice, Recipe
from mmrl_core.rewards.function import RewardFunction
from mmrl_core.yaml_source import Location, RecipeSource

log = logging.getLogger("mmrl.plugins")

KINDS = {
    "device": "mmrl_device_ops",
    "backend": "mmrl_training_backends",
    "rollout": "mmrl_rollout_engines",
    "reward": "mmrl_rewards",
    "policy": "mmrl_policies",
    "launcher": "mmrl_launchers",
    "prompt source": "mmrl_prompt_sources",
    "writer": "mmrl_writers",
    "weight format": "mmrl_weight_formats",
    "advantage estimator": "mmrl_advantage_estimators",
    "policy loss": "mmrl_policy_losses",
}
"""Kind of component -> the hook that declares it."""


@dataclass(kw_only=True)
class Plugin:
    """One entry point of the group `mmrl`, loaded or not."""

    name: str
    distribution: str
    version: str
    module: str
    error: str | None = None
    """Why it is not usable; None when it is."""
    blocked: bool = False
    components: dict[str, list[Component]] = field(default_factory=dict)
    """By kind."""
    patches: list[Patch] = field(default_factory=list)
    diagnoses: list[Diagnosis] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Found:
    """A component together with the distribution that declares it."""

    kind: str
    component: Component
    distribution: str
    version: str

    @property
    def name(self) -> str:
        """The component's word."""
        return self.component.name

    def load(self) -> Any:
        """Import and return the component's target."""
        return import_string(self.component.target, f"{self.kind} {self.name!r} of {self.distribution} {self.version}")

    def probe(self) -> Probe:
        """Whether it can run here. A probe that raises counts as unavailable, with its error as the reason."""
        if self.component.probe is None:
            return Probe(available=True)
        return ask(self.component.probe, f"probe of {self.kind} {self.name!r}")

    def evaluation_sampling(self) -> dict[str, Any]:
        """A policy's sampling overrides for evaluation: its sampling model's `evaluation_defaults`."""
        if self.component.sampling is None:
            return {}
        model = import_string(self.component.sampling, f"sampling options of {self.kind} {self.name!r}")
        return dict(getattr(model, "evaluation_defaults", {}))

    def validate(self, source: RecipeSource, options: dict[str, Any], at: Location) -> Any:
        """The options as the component's model, or None for a component without options. Raises RecipeError."""
        return _validated(self, self.component.options, source, options, at)


@dataclass(kw_only=True)
class Plugins:
    """Every plugin of this environment."""

    manager: pluggy.PluginManager
    plugins: list[Plugin]

    def found(self, kind: str) -> list[Found]:
        """Usable components of one kind, in the order of discovery (ours first)."""
        return [
            Found(kind=kind, component=c, distribution=p.distribution, version=p.version)
            for p in self.plugins
            if p.error is None and not p.blocked
            for c in p.components.get(kind, [])
        ]

    def get(self, kind: str, word: str) -> Found:
        """The component called `word` or `distribution:word`.

        Raises PluginError when there is none (naming the nearest, and any plugin that failed to load), or when two
        distributions declare it.
        """
        distribution, _, name = word.rpartition(":")
        candidates = [f for f in self.found(kind) if f.name == name]
        if distribution:
            wanted = canonicalize_name(distribution)
            candidates = [f for f in candidates if canonicalize_name(f.distribution) == wanted]
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            names = " and ".join(f"{f.distribution} {f.version}" for f in candidates)
            choices = " or ".join(f"{f.distribution}:{name}" for f in candidates)
            raise PluginError(f"{kind} {name!r} is declared by {names}. Say which: {choices}")
        known = sorted({f.name for f in self.found(kind)})
        message = f"no {kind} called {word!r}.{nearest(name, known)} Installed: {', '.join(known) or 'none'}."
        for plugin in self.plugins:
            if plugin.error is not None:
                first = plugin.error.strip().splitlines()[-1]
                message += f"\nPlugin {plugin.distribution} {plugin.version} failed to load and may declare it: {first}"
                if not distribution or canonicalize_name(distribution) == canonicalize_name(plugin.distribution):
                    message += f"\n{plugin.error.rstrip()}"
            elif plugin.blocked:
                message += f"\nPlugin {plugin.distribution} is blocked by MMRL_PLUGINS or MMRL_DISABLE_PLUGINS."
        raise PluginError(message)


def ask(probe: str, what: str) -> Probe:
    """A probe's answer; one that raises says "no", with its error as the reason."""
    try:
        return cast(Probe, import_string(probe, what)())
    except Exception as error:
        return Probe(available=False, reason=f"its probe failed: {type(error).__name__}: {error}")


def import_string(dotted: str, what: str) -> Any:
    """Import `"package.module:attribute"`. Raises PluginError naming `what` and the cause."""
    module_name, _, attribute = dotted.partition(":")
    try:
        target: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            target = getattr(target, part)
        return target
    except Exception as error:
        raise PluginError(f"{what}: cannot import {dotted!r}: {type(error).__name__}: {error}") from error


@functools.lru_cache(maxsize=1)
def load_plugins() -> Plugins:
    """Discover and load every plugin, once a process. Never raises for a broken plugin: it is a row with an error."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(DeclaringHooks)
    manager.add_hookspecs(LifecycleHooks)
    allow = _words("MMRL_PLUGINS")
    deny = _words("MMRL_DISABLE_PLUGINS")
    named: set[str] = set()
    plugins: list[Plugin] = []
    for entry in _entry_points():
        assert entry.dist is not None
        plugin = Plugin(name=entry.name, distribution=entry.dist.name, version=entry.dist.version, module=entry.value)
        plugins.append(plugin)
        names = {canonicalize_name(plugin.distribution), canonicalize_name(plugin.name)}
        named |= names
        core = canonicalize_name(plugin.distribution) == CORE_DISTRIBUTION
        if not core and ((allow and not names & allow) or names & deny):
            plugin.blocked = True
            continue
        try:
            check_requirement(entry.dist)
            module = entry.load()
            check_api(module, entry.value)
            check_hooks(manager, module, entry.value)
            manager.register(module, name=f"{plugin.distribution}:{plugin.name}")
            for kind, hook in KINDS.items():
                plugin.components[kind] = declared(module, hook, entry.value, Component)
            plugin.patches = declared(module, "mmrl_patches", entry.value, Patch)
            plugin.diagnoses = declared(module, "mmrl_diagnoses", entry.value, Diagnosis)
        except (Exception, SystemExit) as error:  # a plugin that exits must not take the command with it
            plugin.components.clear()
            plugin.patches.clear()
            plugin.diagnoses.clear()
            if isinstance(error, PluginError):
                plugin.error = f"PluginError: {error}"
            else:
                plugin.error = "".join(traceback.format_exception(error))
            registered = manager.get_plugin(f"{plugin.distribution}:{plugin.name}")
            if registered is not None:
                manager.unregister(registered)
    for variable, words in (("MMRL_PLUGINS", allow), ("MMRL_DISABLE_PLUGINS", deny)):
        for word in sorted(words - named):
            log.warning("%s names %r, but no such plugin is installed.%s", variable, word, nearest(word, named))
    return Plugins(manager=manager, plugins=plugins)


def warn_unusable(plugins: Plugins) -> None:
    """One WARNING line for each plugin that failed to load although nothing named it."""
    for plugin in plugins.plugins:
        if plugin.error is not None:
            cause = plugin.error.strip().splitlines()[-1]
            log.warning(
                "plugin %s %s failed to load (%s); details: mmrl doctor", plugin.distribution, plugin.version, cause
            )


def _entry_points() -> list[importlib.metadata.EntryPoint]:
    """Ours first, then by distribution and name; an editable install beside a wheel counts once."""
    unique: dict[tuple[str, str, str], importlib.metadata.EntryPoint] = {}
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        if entry.dist is not None:
            unique.setdefault((canonicalize_name(entry.dist.name), entry.name, entry.value), entry)
    return [unique[key] for key in sorted(unique, key=lambda k: (k[0] != CORE_DISTRIBUTION, k))]


def _words(variable: str) -> set[str]:
    return {str(canonicalize_name(w)) for w in re.split(r"[,\s]+", os.environ.get(variable, "")) if w}


# -------------------------------------------------------------------------------------------------- what a recipe names


@dataclass(frozen=True, kw_only=True)
class Selected:
    """A component that the recipe names, with its validated options."""

    found: Found
    options: Any

    def create(self, *arguments: Any) -> Any:
        """Import the target and construct it: a device with its options if it has any, anything else with its options
        (and `arguments` after them). A function decorated with `@reward` becomes a Reward."""
        target = self.found.load()
        if self.found.kind == "device":
            return target() if self.options is None else target(self.options)
        if isinstance(target, RewardFunction):
            return target.create(self.options)
        return target(self.options, *arguments)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Everything the recipe names, found and checked."""

    device: Selected
    launcher: Selected
    policy: Selected
    backend: Selected
    rollout: Selected
    data: Selected
    rewards: Sequence[Selected]
    writers: Sequence[Selected]
    sampling: Any
    eval_data: Selected | None
    eval_sampling: Any
    advantage: Selected | None = None
    """What computes advantages in place of the built-in formulas."""
    policy_loss: Selected | None = None
    """The policy-gradient term in place of the built-in ones."""

    def all(self) -> list[Selected]:
        """Every selected component."""
        single = [self.device, self.launcher, self.policy, self.backend, self.rollout, self.data]
        optional = [s for s in (self.eval_data, self.advantage, self.policy_loss) if s is not None]
        return [*single, *self.rewards, *self.writers, *optional]

    def digest(self) -> str:
        """Of (distribution, version, kind, name) of every component: ranks compare it before they start."""
        rows = sorted((s.found.distribution, s.found.version, s.found.kind, s.found.name) for s in self.all())
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def resolve(recipe: Recipe, source: RecipeSource, plugins: Plugins | None = None) -> Selection:
    """Find every component the recipe names and validate its options. Imports options modules only.

    Raises RecipeError listing every problem with its line.
    """
    plugins = plugins or load_plugins()
    problems: list[str] = []

    def select(kind: str, choice: Choice, at: Location) -> Selected | None:
        try:
            word = automatic_word(kind, choice.name, plugins)
            found = plugins.get(kind, word)
            return Selected(found=found, options=found.validate(source, choice.options, at))
        except PluginError as error:
            problems.append(str(source.error((*at, "name") if (*at, "name") in source.lines else at, str(error))))
        except RecipeError as error:
            problems.append(str(error))
        return None

    def sampling(policy: Selected | None, values: dict[str, Any], at: Location) -> Any:
        if policy is None:
            return None
        try:
            return _validated(policy.found, policy.found.component.sampling, source, values, at)
        except RecipeError as error:
            problems.append(str(error))
            return None

    policy = select("policy", recipe.model.policy, ("model", "policy"))
    chosen = {
        "device": select("device", recipe.device, ("device",)),
        "launcher": select("launcher", recipe.launcher, ("launcher",)),
        "policy": policy,
        "backend": select("backend", recipe.backend, ("backend",)),
        "rollout": select("rollout", recipe.rollout, ("rollout",)),
        "data": select("prompt source", recipe.data, ("data",)),
        "rewards": [select("reward", c, ("rewards", i)) for i, c in enumerate(recipe.rewards)],
        "writers": [select("writer", c, ("writers", i)) for i, c in enumerate(recipe.writers)],
        "sampling": sampling(policy, recipe.sampling, ("sampling",)),
        "eval_data": None,
        "eval_sampling": None,
    }
    algorithm = recipe.algorithm
    if algorithm.advantage.plugin is not None:
        at = ("algorithm", "advantage", "plugin")
        chosen["advantage"] = select("advantage estimator", algorithm.advantage.plugin, at)
    if algorithm.loss.plugin is not None:
        chosen["policy_loss"] = select("policy loss", algorithm.loss.plugin, ("algorithm", "loss", "plugin"))
    if recipe.eval is not None:
        chosen["eval_data"] = select("prompt source", recipe.eval.data, ("eval", "data"))
        defaults = policy.found.evaluation_sampling() if policy else {}
        merged = {**recipe.sampling, **defaults, **recipe.eval.sampling}
        chosen["eval_sampling"] = sampling(policy, merged, ("eval", "sampling"))
    if problems:
        raise RecipeError("\n".join(problems))
    return Selection(**chosen)


def automatic_word(kind: str, word: str, plugins: Plugins) -> str:
    """The component that `auto` stands for here; any other word as it is."""
    if word != "auto":
        return word
    if kind == "launcher":
        return "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ or "RANK" in os.environ else "local"
    if kind != "device":  # no other kind has an automatic choice: "auto" is a name like any other
        return word
    for found in plugins.found("device"):
        if found.name != "cpu" and found.component.probe is not None and found.probe().available:
            return f"{found.distribution}:{found.name}"
    return "cpu"


def _validated(found: Found, model: str | None, source: RecipeSource, options: dict[str, Any], at: Location) -> Any:
    if model is None:
        if options:
            raise source.error((*at, next(iter(options))), f"{found.kind} {found.name!r} takes no options")
        return None
    kind = import_string(model, f"options of {found.kind} {found.name!r} of {found.distribution}")
    return source.validate(kind, options, at)
