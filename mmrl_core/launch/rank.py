"""What a rank of the local launcher runs: `python -m mmrl_core.launch.rank WORKER_MODULE RECIPE`.

Before anything heavy is imported the rank ties its life to the launcher's and sends its output where it belongs.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from mmrl_core.errors import MmrlError
from mmrl_core.launch.failure import INTERRUPTED, mark_failure, report_error
from mmrl_core.launch.parent import die_with_parent

LOG_VARIABLE = "MMRL_RANK_LOG"
"""File that takes a rank's stdout and stderr; not set for rank 0, whose output goes to the terminal."""


def main(arguments: list[str]) -> int:
    """Run `WORKER_MODULE.main(RECIPE)` and return its exit status. Does not return when that fails."""
    module, recipe = arguments
    die_with_parent()
    log = os.environ.get(LOG_VARIABLE)
    if log is not None:
        _send_output_to(Path(log))
    try:
        status: int = importlib.import_module(module).main(Path(recipe))
    except MmrlError as error:
        mark_failure()
        _end_now(report_error(error))
    except KeyboardInterrupt:
        mark_failure()
        _end_now(INTERRUPTED)
    except Exception:  # noqa: BLE001 - this is where it is shown; the launcher shows it again from the log
        mark_failure()
        traceback.print_exc()
        _end_now(1)
    if status != 0:
        mark_failure()
    return status


def _end_now(status: int) -> NoReturn:
    """Without the interpreter's teardown: destroying a process group whose peers are in the middle of a collective
    may abort or wait for them."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _send_output_to(path: Path) -> None:
    """Append file descriptors 1 and 2 to `path`, so that native libraries' messages land there too."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
