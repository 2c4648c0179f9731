"""What a device recommends for a run: asked of its plugin, merged with what is set. Imports no torch."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence

from mmrl_core.errors import PluginError
from mmrl_core.hookspecs import EnvironmentVariable
from mmrl_core.plugins import Found, import_string
from mmrl_core.recipe import Recipe

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def recommended(device: Found, recipe: Recipe, *, ranks: int, nodes: int = 1) -> list[EnvironmentVariable]:
    """What `device` wants for `recipe` with `ranks` on each of `nodes` machines; nothing when it says nothing.

    Raises PluginError when the plugin's answer is not a list of EnvironmentVariable with names that a shell accepts.
    """
    function = device.component.environment
    if function is None:
        return []
    what = f"environment of device {device.name!r} of {device.distribution}"
    answer = list(import_string(function, what)(recipe, ranks=ranks, nodes=nodes))
    for variable in answer:
        if not isinstance(variable, EnvironmentVariable) or not _NAME.fullmatch(variable.name):
            raise PluginError(f"{what}: {function} returned {variable!r}; it must return EnvironmentVariable objects")
    return answer


def additions(variables: Sequence[EnvironmentVariable], given: Mapping[str, str]) -> dict[str, str]:
    """What to set beside the environment `given`: a variable that is set already stays as it is, and a list gets what
    it lacks."""
    added: dict[str, str] = {}
    for variable in variables:
        present = given.get(variable.name, "")
        if not present:
            added[variable.name] = variable.value
        elif variable.extends and variable.value not in re.split(r"[:\s]+", present):
            added[variable.name] = f"{present}:{variable.value}"
    return added


def as_shell(variables: Sequence[EnvironmentVariable]) -> str:
    """Lines for a POSIX shell to `eval`, each variable under its reason."""
    lines = []
    for variable in variables:
        lines.append(f"# {variable.reason}")
        value = shlex.quote(variable.value)
        # the colon and what stands before it only where there is something
        before = f'"${{{variable.name}:+${variable.name}:}}"' if variable.extends else ""
        lines.append(f"export {variable.name}={before}{value}")
    return "\n".join(lines)


def as_json(variables: Sequence[EnvironmentVariable]) -> str:
    """An object by name: value, whether it extends a list, reason."""
    table = {v.name: {"value": v.value, "extends": v.extends, "reason": v.reason} for v in variables}
    return json.dumps(table, indent=2)
