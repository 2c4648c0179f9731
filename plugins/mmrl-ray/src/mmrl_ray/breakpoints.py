"""`breakpoint()` in a rank, for `ray debug`: what PYTHONBREAKPOINT names when mmrl is started with RAY_DEBUG=legacy.

A rank is no Ray worker, and joins the cluster only when it has come to a breakpoint.
"""

from __future__ import annotations

import os
import sys

ADDRESS_VARIABLE = "MMRL_RAY_ADDRESS"
DEBUG_VARIABLE = "RAY_DEBUG"


def set_trace() -> None:
    """Announce the breakpoint to the cluster and wait for `ray debug` on this node; `c` goes on."""
    import ray
    from ray.util import rpdb

    if not ray.is_initialized():
        here = os.environ.get("PYTHONBREAKPOINT")
        ray.init(address=os.environ[ADDRESS_VARIABLE], log_to_driver=False, logging_level="ERROR")
        os.environ["PYTHONBREAKPOINT"] = here or ""  # joining changes it
    frame = sys._getframe().f_back
    rpdb._connect_ray_pdb().set_trace(frame=frame)
