"""`python -m mmrl_core.perf.process RECIPE [key=value ...]`: what `mmrl train` does, with the measuring worker.

A process of its own for each measured combination, run by the driver from the checkout that is measured.
"""

from __future__ import annotations

import os
import sys

from mmrl_core.errors import MmrlError
from mmrl_core.launch.failure import report_error
from mmrl_core.launch.logs import configure_console
from mmrl_core.launch.parent import PARENT_VARIABLE, die_with_parent
from mmrl_core.packaged_models import local_path
from mmrl_core.plugins import load_plugins, resolve
from mmrl_core.recipe import load_recipe
from mmrl_core.resolved import complete, require_available

WORKER = "mmrl_core.perf.worker"


def main(arguments: list[str]) -> int:
    """The launcher's exit status, or that of the error, which is one message on stderr."""
    die_with_parent()
    os.environ.pop(PARENT_VARIABLE, None)
    configure_console()
    try:
        recipe, source = load_recipe(arguments[0], arguments[1:])
        plugins = load_plugins()
        selection = resolve(recipe, source, plugins)
        require_available(selection)
        full = complete(recipe, selection, plugins)
        model = full.model.model_copy(update={"path": local_path(full.model.path)})
        status: int = selection.launcher.create().launch(full.model_copy(update={"model": model}), WORKER)
    except MmrlError as error:
        return report_error(error)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
