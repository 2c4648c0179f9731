"""Finds every call of an operator of torch_npu in the source of mmrl-npu."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "mmrl_npu"


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call in the source."""

    operator: str
    """`npu_rms_norm`."""
    positional: int
    """How many arguments are given by position."""
    keywords: tuple[str, ...]
    """Names of the others."""
    constants: dict[str, object]
    """Values of those among them that are literals."""
    where: str
    """`file:line`."""


def calls(source: Path = SOURCE) -> list[Call]:
    """Every call `something.npu_...(...)`. Raises AssertionError for one that unpacks its arguments: it could not be
    checked."""
    return [call for file in sorted(source.rglob("*.py")) for call in _calls_of(file, source)]


def called_operators() -> set[str]:
    """The operators' names."""
    return {call.operator for call in calls()}


def mentions(source: Path = SOURCE) -> set[str]:
    """Every attribute and string that is the name of an operator, called or not (an alias would escape `calls`)."""
    names: set[str] = set()
    for file in source.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr.startswith("npu_"):
                names.add(node.attr)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                names |= {node.value} if node.value.startswith("npu_") else set()
    return names


def _calls_of(file: Path, source: Path) -> Iterator[Call]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if not node.func.attr.startswith("npu_"):
            continue
        where = f"{file.relative_to(source)}:{node.lineno}"
        assert not any(isinstance(argument, ast.Starred) for argument in node.args), where
        assert all(keyword.arg is not None for keyword in node.keywords), where
        yield Call(
            operator=node.func.attr,
            positional=len(node.args),
            keywords=tuple(str(keyword.arg) for keyword in node.keywords),
            constants={
                str(keyword.arg): keyword.value.value
                for keyword in node.keywords
                if isinstance(keyword.value, ast.Constant)
            },
            where=where,
        )
