"""YAML with positions: turns what pydantic rejects into errors with file, line, field, value and what to do."""

from __future__ import annotations

import re
import types
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from mmrl_core.errors import RecipeError, nearest

_EXPONENT = r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+"

Location = tuple[str | int, ...]
Model = TypeVar("Model", bound=BaseModel)


class RecipeSource:
    """A recipe's data together with where each value stands."""

    def __init__(self, path: Path, data: dict[str, Any], lines: dict[Location, int]) -> None:
        self.path = path
        self.data = data
        self.lines = lines
        self.overridden: dict[Location, str] = {}

    @classmethod
    def read(cls, path: Path, overrides: list[str]) -> RecipeSource:
        """Parse the file, then apply `a.b=value` overrides. Raises RecipeError."""
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise RecipeError(f"{path}: no such recipe file (working directory {Path.cwd()})") from None
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}: cannot read the recipe: {error}") from error
        lines: dict[Location, int] = {}
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
            data = _build(root, (), lines, path) if root is not None else None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{path}:{mark.line + 1}" if mark else str(path)
            raise RecipeError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
        if not isinstance(data, dict):
            raise RecipeError(f"{path}: a recipe is a mapping of fields; this file holds {type(data).__name__}")
        source = cls(path, data, lines)
        for override in overrides:
            source._override(override)
        return source

    @classmethod
    def of_overrides(cls, name: Path, overrides: list[str]) -> RecipeSource:
        """What `a.b=value` overrides alone say, without a file; `name` stands for it in errors. Raises RecipeError."""
        source = cls(name, {}, {})
        for override in overrides:
            source._override(override)
        return source

    def _override(self, text: str) -> None:
        key, separator, raw = text.partition("=")
        if not separator or not key.strip():
            raise RecipeError(f"override {text!r}: write key=value, for example algorithm.steps=10")
        try:
            root = yaml.compose(raw, Loader=yaml.SafeLoader)
            value = _build(root, (), {}, Path(f"override {text!r}")) if root is not None else None
        except yaml.YAMLError as error:
            raise RecipeError(f"override {text!r}: the value is not valid YAML: {error}") from error
        parts: list[str | int] = [int(p) if p.isdigit() else p for p in key.strip().split(".")]
        target: Any = self.data
        for depth, part in enumerate(parts[:-1]):
            if isinstance(target, list) and isinstance(part, int) and part < len(target):
                child = target[part]
            elif isinstance(target, dict) and isinstance(part, str):
                child = target.setdefault(part, {})
            else:
                raise RecipeError(f"override {text!r}: {_dotted(tuple(parts[: depth + 1]))} does not exist")
            if isinstance(child, str) and isinstance(target, dict | list):
                child = {"name": child}  # `backend: fsdp2` plus `backend.option=value`
            elif child is None:
                child = {}
            target[part] = child
            target = child
        last = parts[-1]
        if isinstance(target, list):
            if not isinstance(last, int) or last > len(target):
                raise RecipeError(f"override {text!r}: {_dotted(tuple(parts[:-1]))} is a list of {len(target)}")
            if last == len(target):
                target.append(value)
            else:
                target[last] = value
        elif isinstance(target, dict) and isinstance(last, str):
            target[last] = value
        else:
            raise RecipeError(f"override {text!r}: {_dotted(tuple(parts[:-1]))} is not a section")
        place = tuple(parts)
        for stale in [at for at in self.lines if at[: len(place)] == place]:
            del self.lines[stale]
        self.overridden[place] = text

    def where(self, location: Location) -> str:
        """`file:line`, or the override, of the value at `location` or of its nearest enclosing section."""
        for end in range(len(location), -1, -1):
            part = location[:end]
            if part in self.overridden:
                return f"override {self.overridden[part]!r}"
            if part in self.lines:
                return f"{self.path}:{self.lines[part]}"
        return str(self.path)

    def error(self, location: Location, problem: str) -> RecipeError:
        """A RecipeError for one value, with its position and field name."""
        return RecipeError(f"{self.where(location)}: {_dotted(location)}: {problem}")

    def validate(self, model: type[Model], data: Any = None, at: Location = ()) -> Model:
        """Validate `data` (the whole recipe by default) that stands at `at`. Raises RecipeError with every problem."""
        try:
            return model.model_validate(self.data if data is None else data)
        except ValidationError as error:
            problems = []
            for detail in error.errors(include_url=False):
                location = self._real_location(at, detail["loc"])
                if detail["type"] == "missing" and location[-1:] != detail["loc"][-1:]:
                    location = (*location, detail["loc"][-1])  # of a component given as a plain word
                problems.append(f"{self.where(location)}: {_dotted(location)}: {_explain(detail, model)}")
            raise RecipeError("\n".join(problems)) from None

    def _real_location(self, at: Location, loc: tuple[int | str, ...]) -> Location:
        """Pydantic's location without the parts it adds (union members, `options`)."""
        real: list[str | int] = list(at)
        value: Any = self.data
        for part in at:
            if isinstance(value, dict):
                value = value.get(part)
            else:
                value = value[part] if isinstance(value, list) and isinstance(part, int) else None
        for position, part in enumerate(loc):
            last = position == len(loc) - 1
            if (isinstance(value, dict) and (part in value or last)) or (value is None and last):
                value = value.get(part) if value else None
            elif isinstance(value, list) and isinstance(part, int) and part < len(value):
                value = value[part]
            else:
                continue
            real.append(part)
        return tuple(real)


def reads_as_string(text: str) -> bool:
    """Whether the plain (unquoted) scalar `text` is read as that string by a recipe: what its writer must know."""
    node = yaml.compose(text, Loader=yaml.SafeLoader) if _plain(text) else None
    return isinstance(node, yaml.ScalarNode) and node.style is None and _scalar(node) == text


def _plain(text: str) -> bool:
    """Cheap and strict: anything unusual is quoted by the writer anyway."""
    return re.fullmatch(r"[A-Za-z0-9_./+-]+", text) is not None and text != "..."  # which ends a document


def _build(
    node: yaml.Node, at: Location, lines: dict[Location, int], path: Path, above: tuple[yaml.Node, ...] = ()
) -> Any:
    """Plain data from a YAML node; records the line of every value; duplicate keys and cycles are errors."""
    lines.setdefault(at, node.start_mark.line + 1)
    if any(node is parent for parent in above):
        raise RecipeError(f"{path}:{node.start_mark.line + 1}: {_dotted(at)}: a value that contains itself")
    above = (*above, node)
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            line = key_node.start_mark.line + 1
            if key is None:
                raise RecipeError(f"{path}:{line}: a field name must be a plain word")
            if key in mapping:
                first = lines[(*at, key)]
                raise RecipeError(f"{path}:{line}: {_dotted((*at, key))}: given twice (first on line {first})")
            lines[(*at, key)] = line
            mapping[key] = _build(value_node, (*at, key), lines, path, above)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_build(child, (*at, i), lines, path, above) for i, child in enumerate(node.value)]
    assert isinstance(node, yaml.ScalarNode)
    return _scalar(node)


def _scalar(node: yaml.ScalarNode) -> Any:
    """A string, number, truth value or null."""
    if node.tag == "tag:yaml.org,2002:timestamp":  # recipes have no dates: 2024-01-01 is a name
        return node.value
    value = yaml.SafeLoader("").construct_object(node)
    if isinstance(value, str) and node.style is None and re.fullmatch(_EXPONENT, value):
        return float(value)  # YAML 1.1 reads 1e-5 as a string; everybody means the number
    return value


def _dotted(location: Location) -> str:
    return ".".join(str(part) for part in location) or "(recipe)"


def _explain(detail: ErrorDetails, model: type[BaseModel]) -> str:
    """One pydantic error in the words of a recipe."""
    kind, value = detail["type"], detail["input"]
    if kind == "missing":
        return "required field is missing"
    if kind == "extra_forbidden":
        known = _fields_at(model, detail["loc"][:-1])
        name = str(detail["loc"][-1])
        return f"unknown field (value {value!r}).{nearest(name, known)} Allowed: {', '.join(sorted(known)) or 'none'}"
    message = detail["msg"][0].lower() + detail["msg"][1:]
    message = message.removeprefix("value error, ")
    if kind == "literal_error":
        expected = detail.get("ctx", {}).get("expected", "")
        hint = (
            nearest(value, [w.strip(" '") for w in expected.replace(" or ", ",").split(",")])
            if isinstance(value, str)
            else ""
        )
        return f"got {value!r}; allowed: {expected}.{hint}"
    return f"{message} (got {_short(value)})"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _fields_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Field names of the section at `loc`, for suggestions."""
    current: type[BaseModel] | None = model
    for part in loc:
        if current is None or isinstance(part, int):
            continue
        field = current.model_fields.get(part)
        if field is None:
            continue
        current = _model_in(field.annotation)
    return list(current.model_fields) if current is not None else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, list, tuple) and get_origin(annotation) is not Literal:
        for argument in get_args(annotation):
            found = _model_in(argument)
            if found is not None:
                return found
    return None
