"""Named chat templates, rendered to text without a tokenizer.

Each is a file `templates/NAME.jinja`. A model trained with a template knows its exact text, so the text is an
interface: templates are added, never edited. A path to a `.jinja` file of the user's is rendered the same way.
Variables and functions are those of Hugging Face chat templates (`messages`, `add_generation_prompt`, `tools`,
`raise_exception`, `tojson`, loop controls); special tokens are written out, because there is no tokenizer to ask.
Imports no torch.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mmrl_core.errors import DataError, nearest

DIRECTORY = Path(__file__).parent / "templates"
SUFFIX = ".jinja"


class _Missing(jinja2.Undefined):
    """A name that is not there may be tested, as templates do, but printing or looping over it is a mistake."""

    def __str__(self) -> str:
        self._fail_with_undefined_error()

    def __iter__(self) -> Iterator[Any]:
        self._fail_with_undefined_error()

    def __len__(self) -> int:
        self._fail_with_undefined_error()


class Template:
    """One template, compiled."""

    def __init__(self, name: str, source: str) -> None:
        """Raises DataError when `source` is not valid Jinja."""
        self.name = name
        self.source = source
        try:
            self._compiled = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"template {name}:{error.lineno}: {error.message}") from error

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text of a conversation, up to where the model's answer begins.

        Raises DataError when the template refuses the conversation or uses a variable that does not exist.
        """
        assert messages
        try:
            return self._compiled.render(messages=messages, add_generation_prompt=True, tools=None, documents=None)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise DataError(f"template {self.name}: {error or type(error).__name__}") from error


@functools.lru_cache(maxsize=1)
def template_names() -> tuple[str, ...]:
    """The names of the built-in templates."""
    return tuple(sorted(path.stem for path in DIRECTORY.glob(f"*{SUFFIX}")))


def unknown_template(word: str) -> str | None:
    """What is wrong with `word` as a template, or None: a built-in name, or a path ending in .jinja."""
    known = template_names()
    if word in known or word.endswith(SUFFIX):
        return None
    return (
        f"no template called {word!r}.{nearest(word, ('chat', *known))} Known: chat (the model's own), "
        f"{', '.join(known)}, or a path to a {SUFFIX} file"
    )


def load_template(word: str) -> Template:
    """The built-in template of that name, or the one in the file at that path. Raises DataError."""
    problem = unknown_template(word)
    if problem is not None:
        raise DataError(problem)
    path = Path(word).expanduser() if word.endswith(SUFFIX) else DIRECTORY / f"{word}{SUFFIX}"
    try:
        return Template(word, path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"template {word}: no such file (working directory {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"template {word}: cannot read it: {error}") from error


def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, undefined=_Missing, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    # Jinja's own tojson escapes for HTML, which would put &#39; and \u003c into prompts.
    environment.filters["tojson"] = _tojson
    return environment


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
