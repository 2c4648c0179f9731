"""What a user sees of an error: one place for the command line and for the ranks it starts."""

from __future__ import annotations

import os
import sys
import traceback

from mmrl_core.errors import MmrlError

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it (128 + SIGINT)."""


def report_error(error: MmrlError, *, debug: bool = False) -> int:
    """Print `mmrl: message` to stderr, after the traceback with `debug` or MMRL_DEBUG; returns the exit status."""
    if debug or debugging():
        traceback.print_exception(error)
    print(f"mmrl: {error}", file=sys.stderr, flush=True)
    return error.exit_code


def debugging() -> bool:
    """MMRL_DEBUG is set to something other than 0."""
    return os.environ.get("MMRL_DEBUG", "0") not in ("", "0")
