"""`{name}` placeholders in question templates.

Not `str.format`: mathematical prompts are full of braces (`\\boxed{}`), which stay as they are here, and a template
must not be able to reach into Python objects. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z0-9_]+)*)\}")


def placeholder_names(template: str) -> list[str]:
    """The names in `{name}` and `{a.b}`, in order. `{{` and `}}` stand for single braces; `{}` is plain text."""
    return [m.group(1) for m in _PLACEHOLDER.finditer(template) if m.group(1)]


def fill(template: str, value_of: Callable[[str], Any]) -> str:
    """The template with each `{name}` replaced by `str(value_of(name))`; what is put in is not looked at again."""

    def replace(match: re.Match[str]) -> str:
        name = match.group(1)
        return str(value_of(name)) if name else match.group(0)[0]

    return _PLACEHOLDER.sub(replace, template)
