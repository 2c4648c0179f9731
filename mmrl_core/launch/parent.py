"""A child process that does not outlive its parent, whatever the parent dies of."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

PARENT_VARIABLE = "MMRL_PARENT_PID"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_POLL_S = 1.0


def die_with_parent(parent: int | None = None) -> None:
    """Have this process killed when the process `parent` ends; does nothing when no parent is known.

    `parent` defaults to the environment's MMRL_PARENT_PID and must be the process that started this one. Call it
    first thing in the child. Linux kills at once (PR_SET_PDEATHSIG, tied to the thread that started the child);
    elsewhere a thread looks every second.
    """
    if parent is None:
        text = os.environ.get(PARENT_VARIABLE)
        if not text:
            return
        parent = int(text)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    else:
        threading.Thread(target=_watch, args=(parent,), name="mmrl-parent-watch", daemon=True).start()
    if os.getppid() != parent:  # it died before we asked
        os.kill(os.getpid(), signal.SIGKILL)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    os.kill(os.getpid(), signal.SIGKILL)
