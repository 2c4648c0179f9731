"""What the documentation's tests share: the generator, and the code blocks of every page."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Block:
    """One fenced code block of a page."""

    page: str
    line: int
    language: str
    title: str | None
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Pages:
    """Everything that people read: README files and docs/, generated pages aside."""

    root: Path
    texts: dict[str, str]

    def blocks(self, *languages: str) -> list[Block]:
        return [block for page, text in self.texts.items() for block in _blocks(page, text, languages)]

    def inline(self) -> Iterator[tuple[str, str]]:
        """(page, content) of every code span outside blocks."""
        for page, text in self.texts.items():
            prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
            for span in re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", prose):
                yield page, " ".join(span.split())


def _blocks(page: str, text: str, languages: tuple[str, ...]) -> Iterator[Block]:
    pattern = re.compile(r"^( *)```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
    for found in pattern.finditer(text):
        indent, language, title, body = found.groups()
        if language in languages:
            lines = [line.removeprefix(indent) for line in body.splitlines()]
            yield Block(page, text[: found.start()].count("\n") + 1, language, title, "\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def pages() -> Pages:
    packages = [*sorted(ROOT.glob("contrib/*/README.md")), *sorted(ROOT.glob("plugins/*/README.md"))]
    files = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *packages]
    texts = {
        str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in files if "generated" not in file.parts
    }
    return Pages(ROOT, texts)


@pytest.fixture(scope="session")
def generator() -> Any:
    """The module docs/generate.py, which is not part of a package."""
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def generated(generator: Any) -> dict[str, str]:
    """File name -> Markdown of the generated reference."""
    return generator.pages()
