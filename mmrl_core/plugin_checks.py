"""What a plugin must satisfy to be used; each failure says who, what, why and what to do. Imports no torch."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import pluggy
from packaging.requirements import Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name

from mmrl_core.errors import PluginError, nearest
from mmrl_core.hookspecs import API_VERSION, Component, DeclaringHooks, Diagnosis, LifecycleHooks, Patch

CORE_DISTRIBUTION = "mmrl-core"

Declared = TypeVar("Declared", Component, Patch, Diagnosis)


def check_requirement(distribution: importlib.metadata.Distribution) -> None:
    """The distribution's requirement on mmrl-core, if it has one, must admit the installed version."""
    installed = importlib.metadata.version(CORE_DISTRIBUTION)
    for text in distribution.requires or []:
        requirement = Requirement(text)
        if canonicalize_name(requirement.name) != CORE_DISTRIBUTION:
            continue
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            raise PluginError(
                f"{distribution.name} {distribution.version} requires {requirement}, but mmrl-core {installed} is "
                f"installed. Cure: pip install --upgrade {distribution.name} mmrl-core"
            )


def check_api(plugin: Any, where: str) -> None:
    """The plugin (a module or an object) must state the `mmrl_api` that this mmrl-core speaks."""
    stated = getattr(plugin, "mmrl_api", None)
    if stated != API_VERSION:
        raise PluginError(
            f"{where} states mmrl_api = {stated!r}; this mmrl-core speaks {API_VERSION}. "
            f"Cure: set `mmrl_api = {API_VERSION}` in the plugin, or install a matching version"
        )


def check_hooks(manager: pluggy.PluginManager, plugin: Any, where: str) -> None:
    """Every hook implementation must be marked, be one of ours, and take only arguments that the hook passes."""
    specs = {name: f for c in (DeclaringHooks, LifecycleHooks) for name, f in inspect.getmembers(c, inspect.isfunction)}
    for name, function in inspect.getmembers(plugin, inspect.isroutine):
        if manager.parse_hookimpl_opts(plugin, name) is None:
            if name in specs:
                raise PluginError(f"{where}: {name} is not marked; put @hookimpl (from mmrl_core) above it")
            continue
        if name not in specs:
            raise PluginError(f"{where}: {name} implements no hook of mmrl.{nearest(name, specs)}")
        given = list(inspect.signature(function).parameters)
        offered = [p for p in inspect.signature(specs[name]).parameters if p != "self"]
        unknown = [p for p in given if p not in offered]
        if unknown:
            raise PluginError(
                f"{where}: {name}({', '.join(given)}): the hook passes no {unknown[0]!r}."
                f"{nearest(unknown[0], offered)} It passes: {', '.join(offered) or 'nothing'}"
            )


def declared(plugin: Any, hook: str, where: str, kind: type[Declared]) -> list[Declared]:
    """What the plugin's declaring hook returns, checked; [] when it does not implement it."""
    function = getattr(plugin, hook, None)
    if function is None:
        return []
    answer = function()
    where = f"{where}: {hook}()"
    word = kind.__name__
    if not isinstance(answer, Iterable) or isinstance(answer, str | bytes):
        raise PluginError(f"{where} returned {type(answer).__name__}; return a list of {word}")
    items = list(answer)
    for item in items:
        if not isinstance(item, kind):
            raise PluginError(f"{where} returned a {type(item).__name__} in its list; each item is a {word}")
        if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", item.name):
            raise PluginError(f"{where}: {word.lower()} name {item.name!r} must match [a-z0-9][a-z0-9_.-]*")
        for dotted in _references(item):
            if not re.fullmatch(r"[\w.]+:[\w.]+", dotted):
                raise PluginError(f"{where}: {item.name}: {dotted!r} is not of the form 'package.module:name'")
        if isinstance(item, Patch):
            _check_versions(item, where)
    names = [item.name for item in items]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PluginError(f"{where} declares {', '.join(map(repr, twice))} more than once; names must differ")
    return items


def _references(item: Component | Patch | Diagnosis) -> Iterator[str]:
    if isinstance(item, Patch):
        yield from (*item.targets, item.replacement)
    elif isinstance(item, Diagnosis):
        yield item.probe
    else:
        yield from (
            d for d in (item.target, item.options, item.probe, item.sampling, item.environment) if d is not None
        )


def _check_versions(patch: Patch, where: str) -> None:
    try:
        SpecifierSet(patch.versions)
    except InvalidSpecifier as error:
        raise PluginError(
            f"{where}: {patch.name}: versions {patch.versions!r} is not a version range such as '>=1.2,<2'"
        ) from error
