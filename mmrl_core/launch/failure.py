"""What a user sees of an error: one place for the command line and for the ranks it starts."""

from __future__ import annotations

import os
import sys
import time
import traceback
from pathlib import Path

from mmrl_core.errors import MmrlError

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it (128 + SIGINT)."""

MARK_VARIABLE = "MMRL_FAILURE_MARK"
"""Set by the local launcher: the file in which a failing rank leaves the moment."""


def mark_failure() -> None:
    """Leave the moment of this rank's first failure for the launcher. The other ranks will fail too, for want of this
    one, and may be gone before it is: only the moments tell who was first."""
    path = os.environ.get(MARK_VARIABLE)
    if path and not Path(path).exists():
        Path(path).write_text(str(time.time()))


def report_error(error: MmrlError, *, debug: bool = False) -> int:
    """Print `mmrl: message` to stderr, after the traceback with `debug` or MMRL_DEBUG; returns the exit status."""
    if debug or debugging():
        traceback.print_exception(error)
    print(f"mmrl: {error}", file=sys.stderr, flush=True)
    return error.exit_code


def debugging() -> bool:
    """MMRL_DEBUG is set to something other than 0."""
    return os.environ.get("MMRL_DEBUG", "0") not in ("", "0")
