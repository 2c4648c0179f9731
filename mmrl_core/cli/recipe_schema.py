"""The JSON schema of recipes as users write them, with the options of every installed component. Imports no torch."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel

from mmrl_core.plugins import Found, Plugins, import_string
from mmrl_core.recipe import Recipe

_CHOICES = {
    ("Recipe", "device"): "device",
    ("Recipe", "launcher"): "launcher",
    ("ModelSpec", "policy"): "policy",
    ("Recipe", "backend"): "backend",
    ("Recipe", "rollout"): "rollout",
    ("Recipe", "data"): "prompt source",
    ("Recipe", "rewards"): "reward",
    ("Recipe", "writers"): "writer",
    ("EvalSpec", "data"): "prompt source",
    ("AdvantageSpec", "plugin"): "advantage estimator",
    ("LossSpec", "plugin"): "policy loss",
}
"""(model, field) -> the kind of component that the field names."""

_SAMPLING = (("Recipe", "sampling"), ("EvalSpec", "sampling"))
_LISTS = ("rewards", "writers")
_NULLABLE = ("plugin",)
_AUTOMATIC = ("device", "launcher")


def recipe_schema(plugins: Plugins) -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a recipe file. `$defs` holds one entry for each kind of component and one for
    each component's options."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    definitions: dict[str, Any] = schema["$defs"]
    own = _own_fields(definitions["RewardChoice"])
    for kind in dict.fromkeys(_CHOICES.values()):
        definitions[_key(kind)] = _kind(kind, plugins, definitions, own if kind == "reward" else {})
    definitions["sampling"] = _sampling(plugins, definitions)
    for (model, field), kind in _CHOICES.items():
        reference: dict[str, Any] = {"$ref": f"#/$defs/{_key(kind)}"}
        if field in _NULLABLE:
            reference = {"anyOf": [reference, {"type": "null"}]}
        _point(schema, definitions, model, field, {"items": reference} if field in _LISTS else reference)
    for model, field in _SAMPLING:
        _point(schema, definitions, model, field, {"$ref": "#/$defs/sampling"})
    del definitions["Choice"], definitions["RewardChoice"]
    return schema


def _point(schema: dict[str, Any], definitions: dict[str, Any], model: str, field: str, to: dict[str, Any]) -> None:
    """Make a field refer to our definition, keeping its description and, for lists, their bounds."""
    holder = schema if model == Recipe.__name__ else definitions[model]
    before = holder["properties"][field]
    keep = {k: v for k, v in before.items() if k in ("description", "title", "minItems")}
    if "items" in to:
        keep["type"] = "array"
    holder["properties"][field] = {**keep, **to}


def _own_fields(choice: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in choice["properties"].items() if k not in ("name", "options")}


def _kind(kind: str, plugins: Plugins, definitions: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A component by its word, or by a mapping with its options."""
    found = plugins.found(kind)
    words = [*(["auto"] if kind in _AUTOMATIC else []), *dict.fromkeys(f.name for f in found)]
    words += [f"{f.distribution}:{f.name}" for f in found]
    mappings = []
    for component in found:
        options = _options(component, component.component.options, "options", definitions)
        names = [component.name, f"{component.distribution}:{component.name}"]
        properties = {"name": {"enum": names, "description": component.component.summary}, **own}
        properties |= options.get("properties", {})
        key = f"{_key(kind)}.{component.distribution}.{component.name}"
        definitions[key] = {
            "type": "object",
            "description": component.component.summary,
            "properties": properties,
            "required": ["name", *options.get("required", [])],
            "additionalProperties": False,
        }
        mappings.append({"$ref": f"#/$defs/{key}"})
    word = {"type": "string", "enum": words} if words else {"type": "string"}
    return {"description": f"A {kind}: its name, or a mapping with its options", "anyOf": [word, *mappings]}


def _sampling(plugins: Plugins, definitions: dict[str, Any]) -> dict[str, Any]:
    models = []
    for policy in plugins.found("policy"):
        if policy.component.sampling is not None:
            key = f"sampling.{policy.distribution}.{policy.name}"
            definitions[key] = _options(policy, policy.component.sampling, "sampling", definitions)
            models.append({"$ref": f"#/$defs/{key}"})
    return {"description": "Sampling, as the policy defines it", "anyOf": models or [{"type": "object"}]}


def _options(found: Found, dotted: str | None, what: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of a component's options; the models it refers to go into `definitions` under names of their own."""
    if dotted is None:
        return {}
    model = import_string(dotted, f"{what} of {found.kind} {found.name!r} of {found.distribution}")
    assert issubclass(model, BaseModel), f"{dotted} is not a pydantic model"
    prefix = f"{_key(found.kind)}.{found.distribution}.{found.name}.{what}"
    schema: dict[str, Any] = model.model_json_schema(ref_template=f"#/$defs/{prefix}.{{model}}")
    for name, definition in schema.pop("$defs", {}).items():
        definitions[f"{prefix}.{name}"] = definition
    return schema


def _key(kind: str) -> str:
    return re.sub(r"\W+", "_", kind)
