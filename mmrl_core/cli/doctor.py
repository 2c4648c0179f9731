"""`mmrl doctor [RECIPE]`: what this machine has, what is missing for which component, and the cure."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import psutil

from mmrl_core.cli.plugins import Row, rows
from mmrl_core.devices.cores import usable_cores
from mmrl_core.devices.torch_build import torch_build
from mmrl_core.errors import RecipeError
from mmrl_core.hookspecs import API_VERSION
from mmrl_core.patches import Verdict, verdict
from mmrl_core.plugins import Plugins, ask, load_plugins, resolve
from mmrl_core.recipe import load_recipe
from mmrl_core.resolved import unavailable

_LIBRARIES = ("transformers", "safetensors", "peft", "pydantic", "pluggy", "numpy")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser("doctor", help="say what is missing and what cures it", description=__doc__)
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a YAML file: can its components run here?")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example device=cpu")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Exit status 1 when a plugin is broken, or the recipe is wrong or cannot run here."""
    report = examine(load_plugins(), arguments.recipe, arguments.overrides)
    print(json.dumps(report, indent=2) if arguments.json else _text(report))
    return 0 if report["healthy"] else 1


def examine(plugins: Plugins, recipe: str | None = None, overrides: list[str] | None = None) -> dict[str, Any]:
    """Everything that `mmrl doctor` says, as plain data."""
    listed = rows(plugins)
    broken = [
        {"distribution": p.distribution, "version": p.version, "module": p.module, "error": p.error.rstrip()}
        for p in plugins.plugins
        if p.error is not None
    ]
    report: dict[str, Any] = {
        "machine": _machine(),
        "software": _software(),
        "components": [
            {
                "kind": r.kind,
                "name": r.name,
                "distribution": r.distribution,
                "available": r.status == "available",
                "reason": r.reason,
                "cure": r.cure,
            }
            for r in listed
            if r.kind is not None
        ],
        "diagnoses": _diagnoses(plugins),
        "patches": _patches(plugins, listed),
        "broken_plugins": broken,
        "blocked_plugins": _names(listed, "blocked"),
    }
    problems: list[str] = []
    if recipe is not None:
        problems = _recipe_problems(plugins, recipe, overrides or [])
        report["recipe"] = {"path": recipe, "problems": problems}
    report["healthy"] = not broken and not problems
    return report


def _machine() -> dict[str, Any]:
    memory = psutil.virtual_memory()
    disk = shutil.disk_usage(Path.cwd())
    return {
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "memory_bytes": memory.total,
        "memory_available_bytes": memory.available,
        "disk_free_bytes": disk.free,
        "directory": str(Path.cwd()),
    }


def _software() -> dict[str, Any]:
    software: dict[str, Any] = {
        "python": f"{platform.python_version()} ({sys.executable})",
        "mmrl-core": f"{importlib.metadata.version('mmrl-core')} (plugin API {API_VERSION})",
        "torch": torch_build(),
    }
    for name in _LIBRARIES:
        try:
            software[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            software[name] = "not installed"
    return software


def _diagnoses(plugins: Plugins) -> list[dict[str, Any]]:
    """What plugins look at beside their components."""
    answers = []
    for plugin in plugins.plugins:
        for diagnosis in plugin.diagnoses:
            probe = ask(diagnosis.probe, f"diagnosis {diagnosis.name!r} of {plugin.distribution}")
            answers.append(
                {
                    "name": diagnosis.name,
                    "distribution": plugin.distribution,
                    "available": probe.available,
                    "reason": probe.reason,
                    "cure": probe.cure,
                }
            )
    return answers


def _patches(plugins: Plugins, listed: list[Row]) -> list[dict[str, Any]]:
    """Every declared patch: does it fit what is installed, and on which of the devices that are here?"""
    here = [r.name for r in listed if r.kind == "device" and r.status == "available" and r.name is not None]
    found = []
    for plugin in plugins.plugins:
        for patch in plugin.patches:
            said = verdict(patch)
            devices = [name for name in here if not patch.devices or name in patch.devices]
            if said.applies and not devices:
                said = Verdict(applies=False, reason=f"it is for device {' or '.join(patch.devices)}")
            found.append(
                {
                    "name": patch.name,
                    "distribution": plugin.distribution,
                    "changes": patch.distribution,
                    "targets": list(patch.targets),
                    "applies": said.applies,
                    "devices": devices,
                    "verdict": said.reason,
                    "reason": patch.reason,
                    "upstream": patch.upstream,
                }
            )
    return found


def _recipe_problems(plugins: Plugins, path: str, overrides: list[str]) -> list[str]:
    try:
        recipe, source = load_recipe(path, overrides)
        return unavailable(resolve(recipe, source, plugins))
    except RecipeError as error:
        return str(error).splitlines()


def _names(listed: list[Row], status: str) -> list[str]:
    return [f"{row.distribution} {row.version}" for row in listed if row.status == status]


def _text(report: dict[str, Any]) -> str:
    machine, gib = report["machine"], 1024**3
    lines = [
        f"system       {machine['system']}",
        f"cores        {machine['usable_cores']} of {machine['cores']} usable",
        f"memory       {machine['memory_available_bytes'] / gib:.1f} of {machine['memory_bytes'] / gib:.1f} GiB free",
        f"disk         {machine['disk_free_bytes'] / gib:.1f} GiB free in {machine['directory']}",
    ]
    lines += [f"{name:<12} {version}" for name, version in report["software"].items()]
    lines += ["", "components"]
    for c in report["components"]:
        mark = "ok     " if c["available"] else "missing"
        reason = f": {c['reason']}" if c["reason"] else ""
        lines.append(f"  {mark} {c['kind']} {c['name']} ({c['distribution']}){reason}")
        if not c["available"] and c["cure"]:
            lines.append(f"          cure: {c['cure']}")
    if report["diagnoses"]:
        lines += ["", "what plugins found"]
    for d in report["diagnoses"]:
        lines.append(f"  {'ok     ' if d['available'] else 'missing'} {d['name']} ({d['distribution']}): {d['reason']}")
        if not d["available"] and d["cure"]:
            lines.append(f"          cure: {d['cure']}")
    if report["patches"]:
        lines += ["", "patches, applied by their plugin for as long as a run needs them"]
    for p in report["patches"]:
        mark = f"applies on {', '.join(p['devices'])}" if p["applies"] else "does not apply"
        lines.append(f"  {p['name']} ({p['distribution']}) {mark}: {p['verdict']}")
        lines.append(f"          why: {p['reason']}{f' ({link})' if (link := p['upstream']) else ''}")
    for plugin in report["broken_plugins"]:
        lines += ["", f"BROKEN plugin {plugin['distribution']} {plugin['version']} ({plugin['module']})"]
        lines += [f"  {line}" for line in plugin["error"].splitlines()]
        lines.append(
            f"  cure: repair it, pip uninstall {plugin['distribution']}, or set MMRL_DISABLE_PLUGINS="
            f"{plugin['distribution']}"
        )
    if report["blocked_plugins"]:
        lines += ["", f"blocked by MMRL_PLUGINS or MMRL_DISABLE_PLUGINS: {', '.join(report['blocked_plugins'])}"]
    if "recipe" in report:
        problems = report["recipe"]["problems"]
        lines += ["", f"recipe {report['recipe']['path']}: {'cannot run here' if problems else 'can run here'}"]
        lines += [f"  {problem}" for problem in problems]
    lines += ["", "healthy" if report["healthy"] else "not healthy: see above"]
    return "\n".join(lines)
