"""Writes the reference from the code when the site is built (an mkdocs hook, see mkdocs.yml).

Nothing here knows a hook, a field, a metric or a command by name: it reads them, so the reference cannot lag behind.
`pages()` returns what is written, which is also what the tests look at.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mmrl_core import contracts, errors, hookspecs, world
from mmrl_core.cli import main as cli
from mmrl_core.metrics import names
from mmrl_core.plugin_checks import CORE_DISTRIBUTION
from mmrl_core.plugins import KINDS, import_string, load_plugins
from mmrl_core.recipe import Choice, Recipe, RewardChoice, Spec

OUTPUT = Path(__file__).parent / "reference" / "generated"
WORDS = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null", Any: "any value"}
BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "min_length": "length >=", "pattern": "matching"}
CHOICE_FIELDS = {"name": "The component's word, or `distribution:word`."}
"""Fields that every component has, whose meaning is that of `Choice` itself."""


def on_pre_build(config: Any) -> None:
    """mkdocs calls this before it collects the pages."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (OUTPUT / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """File name -> Markdown."""
    return {
        "hooks.md": hooks_page(),
        "contracts.md": contracts_page(),
        "recipe.md": recipe_page(),
        "components.md": components_page(),
        "metrics.md": metrics_page(),
        "cli.md": cli_page(),
        "errors.md": errors_page(),
    }


# ------------------------------------------------------------------------------------------------ hooks and contracts


def hooks_page() -> str:
    """Every hook, and what declaring hooks return."""
    text = f"# Hooks\n\n{prose(hookspecs.__doc__)}\n\nThe plugin API's version is **{hookspecs.API_VERSION}**.\n"
    for cls in (
        hookspecs.Component,
        hookspecs.EnvironmentVariable,
        hookspecs.Probe,
        hookspecs.Patch,
        hookspecs.Diagnosis,
    ):
        text += class_section(cls)
    for title, holder in (
        ("Declaring hooks", hookspecs.DeclaringHooks),
        ("Lifecycle hooks", hookspecs.LifecycleHooks),
    ):
        text += f"\n## {title}\n\n{prose(holder.__doc__)}\n"
        for name, function in public_methods(holder):
            text += f"\n### `{name}`\n\n{signature(function)}\n\n{prose(function.__doc__)}\n"
    return text


def contracts_page() -> str:
    """Every type and contract of `mmrl_core.contracts`, and the World that set-up hands out."""
    text = f"# Contracts\n\n{prose(contracts.__doc__)}\n"
    for cls in [*contract_classes(), world.World]:
        text += class_section(cls)
    text += "\n## Aliases\n"
    for name, value, meaning in aliases():
        text += f"\n### `{name}`\n\n```python\n{name} = {value}\n```\n\n{prose(meaning)}\n"
    return text


def contract_classes() -> list[type]:
    """Public classes of the module, in the order of the source."""
    return [getattr(contracts, n.name) for n in module_tree(contracts).body if isinstance(n, ast.ClassDef)]


def aliases() -> Iterator[tuple[str, str, str]]:
    """(name, value, docstring) of the module's type aliases."""
    body = module_tree(contracts).body
    for node, following in itertools.pairwise(body):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, ast.unparse(node.value), docstring_after(following)


def class_section(cls: type) -> str:
    """Heading, docstring, fields and methods of one class."""
    bases = [b.__name__ for b in cls.__bases__ if b.__module__.startswith("mmrl_core")]
    text = f"\n## `{cls.__name__}`\n\n`{cls.__module__}.{cls.__name__}`"
    text += f", a `{bases[0]}`" if bases else ""
    text += f"\n\n{prose(cls.__doc__)}\n"
    rows = [(f"`{n}`", f"`{kind}`", default, meaning) for n, kind, default, meaning in class_fields(cls)]
    if rows:
        text += "\n" + table(("field", "type", "default", "meaning"), rows)
    if "__init__" in vars(cls) and inspect.isabstract(cls):
        text += f"\nConstructed as `{cls.__name__}{plain_signature(vars(cls)['__init__'], own=True)}`.\n"
    for name, member in public_methods(cls):
        function = member.fget if isinstance(member, property) else member
        notes = ["property"] if isinstance(member, property) else []
        if inspect.isabstract(cls):
            notes.append("required" if getattr(member, "__isabstractmethod__", False) else "optional")
        heading = f"{cls.__name__}.{name}" if name != "__call__" else f"{cls.__name__}()"
        note = f"*{', '.join(notes)}*\n\n" if notes else ""
        text += f"\n### `{heading}`\n\n{note}{signature(function)}\n\n{prose(function.__doc__)}\n"
    return text


def class_fields(cls: type) -> Iterator[tuple[str, str, str, str]]:
    """(name, type, default, meaning) of annotated fields; a field named in the class's docstring is explained there."""
    body = next(
        n.body
        for n in module_tree(inspect.getmodule(cls)).body
        if isinstance(n, ast.ClassDef) and n.name == cls.__name__
    )
    for i, node in enumerate(body):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            meaning = docstring_after(body[i + 1]) if i + 1 < len(body) else ""
            if not meaning and f"`{node.target.id}`" in (cls.__doc__ or ""):
                meaning = "See above."
            default = "" if node.value is None else f"`{ast.unparse(node.value)}`"
            yield node.target.id, ast.unparse(node.annotation).strip("'"), default, one_line(meaning)


def public_methods(cls: type) -> list[tuple[str, Any]]:
    """Methods and properties defined by the class itself, in order; of dunders only those that callers use."""
    return [
        (name, member)
        for name, member in vars(cls).items()
        if (inspect.isfunction(member) or isinstance(member, property))
        and (not name.startswith("_") or (name in ("__call__", "__len__") and member.__doc__))
    ]


def signature(function: Any) -> str:
    """A code block with the function's signature."""
    one = f"def {function.__name__}{plain_signature(function)}"
    if len(one) > 100:
        one = one.replace("(", "(\n    ", 1).replace(", ", ",\n    ")
        one = re.sub(r"\) ->(?=[^)]*$)", "\n) ->", one)
        one = re.sub(r"\[([^\[\]]*)\]", lambda m: m[0].replace(",\n    ", ", "), one)
    return f"```python\n{one}\n```"


def plain_signature(function: Any, *, own: bool = False) -> str:
    """Parameters and return type as written, without `self` (and, with `own`, without the return type)."""
    given = inspect.signature(function)
    parameters = [p for name, p in given.parameters.items() if name != "self"]
    text = str(given.replace(parameters=parameters))
    text = text.replace("'", "")
    return text.partition(" -> ")[0] if own else text


def module_tree(module: Any) -> ast.Module:
    """The parsed source of a module."""
    return ast.parse(inspect.getsource(module))


def docstring_after(node: ast.stmt) -> str:
    """The string that stands below a field, or nothing."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return inspect.cleandoc(node.value.value)
    return ""


# ------------------------------------------------------------------------------------------------ recipe and components


def recipe_page() -> str:
    """Every field of a recipe, section by section."""
    text = "# Recipe\n\nEvery field. Values in a file, then overrides `a.b.c=value` on the command line.\n"
    text += "`mmrl recipe show RECIPE` prints a recipe with all of these filled in; `mmrl recipe schema` prints the\n"
    text += "JSON schema, which editors use for completion. What a *component* takes beside its name is on the page\n"
    text += "[Components](components.md).\n"
    for path, model in recipe_sections():
        title = f"`{path}`" if path else "The file"
        text += f"\n## {title} {{#{anchor(path)}}}\n\n{prose(model.__doc__)}\n\n{fields_table(model, path)}"
    return text


def recipe_sections(model: type[Spec] = Recipe, path: str = "") -> Iterator[tuple[str, type[Spec]]]:
    """(dotted path, model) of every section, the file itself first; `[]` stands for an item of a list."""
    yield path, model
    for name, field in model.model_fields.items():
        for inner in nested_models(field.annotation):
            is_list = get_origin(field.annotation) is list
            yield from recipe_sections(inner, f"{path}.{name}".lstrip(".") + ("[]" if is_list else ""))


def nested_models(annotation: Any) -> list[type[Spec]]:
    """Recipe sections that a type holds. A plain component is no section: its options are its own."""
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return [] if annotation is Choice else [annotation]
    return [m for argument in get_args(annotation) for m in nested_models(argument)]


def components_page() -> str:
    """Every built-in component with its options."""
    text = "# Components\n\nWhat mmrl itself supplies, by the word that a recipe uses, with the options of each.\n"
    text += "Options stand beside the name: `backend: {name: fsdp2, micro_batch_groups: 4}`. `mmrl plugins` lists\n"
    text += "what is installed on your machine, plugins of others included.\n"
    for kind in KINDS:
        text += f"\n## {kind.capitalize()}\n"
        for found in (f for f in load_plugins().found(kind) if f.distribution == CORE_DISTRIBUTION):
            text += f"\n### {kind}: `{found.name}` {{#{anchor(kind)}-{found.name}}}\n\n{found.component.summary}.\n"
            for what, dotted in (("Options", found.component.options), ("Sampling", found.component.sampling)):
                if dotted is None:
                    continue
                model = import_string(dotted, found.name)
                path = f"{kind}-{found.name}-{what.lower()}"
                text += f"\n**{what}** (`{dotted}`). {prose(model.__doc__)}\n\n{fields_table(model, path)}"
                for section, inner in list(recipe_sections(model, path))[1:]:
                    name = section.removeprefix(f"{path}.")
                    text += f"\n#### `{name}` {{#{anchor(section)}}}\n\n{prose(inner.__doc__)}\n\n"
                    text += fields_table(inner, section)
                defaults = getattr(model, "evaluation_defaults", None)
                if defaults:
                    text += f"\nIn evaluation, unless `eval.sampling` says otherwise: `{json.dumps(defaults)}`.\n"
    return text


def fields_table(model: type[BaseModel], path: str) -> str:
    """A table of a model's fields, or a sentence when it has none."""
    rows = [
        (f"`{name}`", type_text(field, f"{path}.{name}".lstrip(".")), default_text(field), one_line(meaning))
        for name, field, meaning in documented_fields(model)
    ]
    return table(("field", "type", "default", "meaning"), rows) if rows else "No options.\n"


def documented_fields(model: type[BaseModel]) -> Iterator[tuple[str, FieldInfo, str]]:
    """(name, field, meaning) of what users write. A component's `options` stand beside its name, not in a field."""
    for name, field in model.model_fields.items():
        if issubclass(model, Choice) and name in Choice.model_fields:
            if name in CHOICE_FIELDS:
                yield name, field, CHOICE_FIELDS[name]
            continue
        yield name, field, field.description or ""


def type_text(field: FieldInfo, path: str) -> str:
    """What may be written, in words, with its bounds."""
    return annotation_text(field.annotation, path) + bounds_text(field.metadata)


def annotation_text(annotation: Any, path: str) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return annotation_text(arguments[0], path) + bounds_text(arguments[1:])
    if origin is Literal:
        return " or ".join(f"`{a}`" for a in arguments)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(annotation_text(a, path) for a in arguments))
    if origin is list:
        return f"list of {annotation_text(arguments[0], path + '[]')}"
    if origin is tuple:
        return f"list of {len(arguments)}: {', '.join(annotation_text(a, path) for a in arguments)}"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        if annotation is Choice:
            return "[component](components.md)"
        word = "component" if issubclass(annotation, RewardChoice) else "section"
        return f"[{word}](#{anchor(path)})"
    return WORDS[annotation]


def bounds_text(metadata: Sequence[Any]) -> str:
    """` >= 1`, from pydantic's or annotated-types' metadata."""
    flat = [inner for item in metadata for inner in (item.metadata if isinstance(item, FieldInfo) else [item])]
    parts = []
    for item in flat:
        for attribute, sign in BOUNDS.items():
            bound = getattr(item, attribute, None)
            if bound is not None:
                parts.append(f"{sign} `{bound}`")
    return " " + ", ".join(parts) if parts else ""


def default_text(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "**required**"
    if isinstance(default, Choice):
        return f"`{default.name}`"
    if isinstance(default, Spec):
        return "its defaults"
    if isinstance(default, list):
        return f"`{json.dumps([d.name if isinstance(d, Choice) else d for d in default])}`"
    return "null" if default is None else f"`{json.dumps(default)}`"


# -------------------------------------------------------------------------------------- metrics, commands, errors


def metrics_page() -> str:
    """Every metric name, as the registry lists them."""
    text = f"# Metrics\n\n{prose(names.__doc__)}\n"
    text += "\nEvery name a run can write is here: emitting one that is not is an error of ours that stops the run.\n"
    text += "`1` is a plain number. `{...}` stands for words of your recipe.\n"
    text += f"Not bit-equal between two equal runs, for they measure time or memory: {code_list(names.VOLATILE)}.\n"
    for title, group in metric_groups():
        text += f"\n## {title}\n\n" + table(
            ("metric", "unit", "meaning"), [(f"`{m.name}`", m.unit, one_line(m.meaning)) for m in group]
        )
    return text


def metric_groups() -> list[tuple[str, Sequence[names.Metric]]]:
    """The registry's own groups, by the name of the tuple that holds them."""
    groups: list[tuple[str, Sequence[names.Metric]]] = [
        (variable.capitalize(), value)
        for variable, value in vars(names).items()
        if isinstance(value, tuple) and value and isinstance(value[0], names.Metric) and value is not names.METRICS
    ]
    assert {m for _, group in groups for m in group} == set(names.METRICS), "a metric outside every group"
    return groups


def cli_page() -> str:
    """Every command and option, from argparse."""
    text = "# Command line\n\nEvery command exits with 0 when it did what it was asked; for the rest see\n"
    text += "[errors](errors.md).\n"
    for words, parser in commands():
        text += f"\n## `{words}` {{#{anchor(words)}}}\n\n"
        text += f"```text\n{usage(parser)}\n```\n"
        if parser.description:
            text += f"\n{prose(parser.description)}\n"
        rows = [
            (f"`{shown}`", one_line(action.help or ""), shown_default(action)) for action, shown in arguments_of(parser)
        ]
        text += "\n" + table(("argument", "meaning", "default"), rows) if rows else ""
        if parser.epilog:
            text += f"\n{parser.epilog}\n"
    return text


def full_parser() -> argparse.ArgumentParser:
    """The parser of `mmrl` with every command in it."""
    parser = argparse.ArgumentParser(prog="mmrl", allow_abbrev=False)
    empty = cli._parser([])
    parser.description = empty.description
    for action in empty._actions:
        if action.option_strings and action.dest != "help":
            parser._add_action(action)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module, _ in cli.COMMANDS.values():
        importlib.import_module(module).add_parser(subparsers)
    return parser


def commands() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """(words, parser) of the program and of every command below it."""

    def walk(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
        yield re.sub(r"\s+", " ", parser.prog), parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for below in dict.fromkeys(action.choices.values()):
                    yield from walk(below)

    return walk(full_parser())


def arguments_of(parser: argparse.ArgumentParser) -> Iterator[tuple[argparse.Action, str]]:
    """(action, how it is written) of everything but --help and the list of subcommands."""
    for action in parser._actions:
        if action.dest == "help" or isinstance(action, argparse._SubParsersAction):
            continue
        value = "" if action.nargs == 0 else str(action.metavar or action.dest.upper())
        yield action, ", ".join(f"{o} {value}".strip() for o in action.option_strings) or value


def shown_default(action: argparse.Action) -> str:
    """The default; empty where there is none, and where it depends on the machine that builds these pages."""
    if action.default in (None, argparse.SUPPRESS, False, []) or action.dest == "workers":
        return ""
    return f"`{action.default}`"


def usage(parser: argparse.ArgumentParser) -> str:
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"  # not the width of the terminal that builds the site
    try:
        return parser.format_usage().strip()
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def errors_page() -> str:
    """Every error class that a user can meet."""
    text = f"# Errors\n\n{prose(errors.__doc__)}\n\nThe command prints one message, `mmrl: ...`, and exits with the\n"
    text += "status below; `--debug` or `MMRL_DEBUG=1` adds the traceback. Anything else that is raised is a bug\n"
    text += "of ours and keeps its traceback.\n\n"
    rows = [(f"`{e.__name__}`", str(e.exit_code), one_line(e.__doc__ or "")) for e in error_classes()]
    text += table(("error", "exit status", "meaning"), rows)
    text += "\nOther statuses: 2 for wrong arguments of a command, 130 after Ctrl-C, 141 when the reader of the\n"
    text += "output has gone, 128 + signal when a rank was killed.\n"
    return text


def error_classes() -> list[type[errors.MmrlError]]:
    """In the order of the source."""
    return [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.MmrlError)]


# ------------------------------------------------------------------------------------------------------------ Markdown


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([cell.replace("\n", " ") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(escape_pipes(cell) for cell in line)} |" for line in lines) + "\n"


def escape_pipes(cell: str) -> str:
    """Outside code spans, where the table extension leaves them alone anyway."""
    parts = re.split(r"(`[^`]*`)", cell)
    return "".join(part if part.startswith("`") else part.replace("|", r"\|") for part in parts)


def prose(text: str | None) -> str:
    """A docstring as Markdown: `::` introduces a code block, by indentation. What is said to maintainers goes."""
    return re.sub(r"\s*This module imports no torch\b[^.]*\.", "", inspect.cleandoc(text or "")).replace("::\n", ":\n")


def code_list(words: Sequence[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def one_line(text: str) -> str:
    return " ".join(text.split())


def anchor(words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") or "file"
