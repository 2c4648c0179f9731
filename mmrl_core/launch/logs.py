"""Where log lines of the package go: the logger `mmrl`. Imports no torch."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

RUN_LOG = "run.log"
_FILE_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_OURS = "_mmrl_configured"


def configure_console() -> None:
    """WARNING and worse to stderr, before there is a run folder."""
    _replace_handlers([_stderr("mmrl: %(levelname)s: %(message)s")])


def configure_logging(run_dir: Path, rank: int) -> None:
    """INFO and worse to `run_dir/run.log` on rank 0 (appended to on resume); WARNING and worse to stderr on every
    rank. Calling it again replaces the handlers of the last call."""
    handlers: list[logging.Handler] = [
        _stderr("mmrl: %(levelname)s: %(message)s" if rank == 0 else f"mmrl rank {rank}: %(levelname)s: %(message)s")
    ]
    if rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(run_dir / RUN_LOG, mode="a", encoding="utf-8")
        file.setLevel(logging.INFO)
        file.setFormatter(logging.Formatter(_FILE_FORMAT))
        handlers.append(file)
    _replace_handlers(handlers)
    if rank == 0:
        from mmrl_core import __version__

        logging.getLogger("mmrl").info("mmrl %s, process %d, in %s", __version__, os.getpid(), Path.cwd())


def _stderr(form: str) -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.WARNING)
    handler.addFilter(lambda record: not getattr(record, "file_only", False))
    handler.setFormatter(logging.Formatter(form))
    return handler


def _replace_handlers(handlers: list[logging.Handler]) -> None:
    logger = logging.getLogger("mmrl")
    for old in [h for h in logger.handlers if getattr(h, _OURS, False)]:
        logger.removeHandler(old)
        old.close()
    for handler in handlers:
        setattr(handler, _OURS, True)
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
