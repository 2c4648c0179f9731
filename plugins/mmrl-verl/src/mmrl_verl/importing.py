"""Importing verl without what it does to the process on the way."""

from __future__ import annotations

import logging


def import_verl() -> None:
    """`import verl`, whose entry points register platforms; the root logger stays as it was.

    verl sets up logging for a process of its own: everybody's messages would then appear on the terminal.
    """
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    import verl  # noqa: F401

    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
    root.setLevel(level)
