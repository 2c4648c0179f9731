"""The guard: the process between the trainer and the process that scores.

It runs nothing of the reward's, so a reward that hangs, even in C code that never lets Python run, cannot keep it from
ending the whole tree: the scoring process and whatever that started. It does so when the trainer asks, when the
trainer is gone (killed -9 included), and when the scoring process ends by itself.

A prctl-based death signal alone would not do: it is tied to the trainer's *thread* that started the worker, and it
leaves the worker's own children behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import struct
import sys
import time
from typing import NoReturn

import psutil

STATUS = struct.Struct(">i")
"""The scoring process's wait status, sent to the trainer when it ends by itself."""

_PARENT_POLL_S = 0.5
_GIVE_UP_S = 60.0
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def adopt_descendants() -> None:
    """Become the parent of descendants whose own parent ended, so that none can hide (Linux)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with(guard: int) -> None:
    """Make this process end when its parent, the guard, ends (Linux)."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != guard:  # it ended before the call above
        os._exit(1)


def watch(scoring: int, lifeline: socket.socket, trainer: int) -> NoReturn:
    """Be the guard of process `scoring` for process `trainer`, which makes `lifeline` readable to end everything."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)  # a signal to the job must not end the guard before its charge
    woken, wake = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    while True:
        status = _reap().get(scoring)
        if status is not None or os.getppid() != trainer:
            break
        # A fork of the trainer may hold the other end of the lifeline open: hence the look at getppid.
        readable, _, _ = select.select([lifeline.fileno(), woken], [], [], _PARENT_POLL_S)
        if lifeline.fileno() in readable:
            break
        if woken in readable:
            os.read(woken, 4096)
    _end_descendants()
    if status is not None:
        with contextlib.suppress(OSError):  # the trainer may be gone
            lifeline.sendall(STATUS.pack(status))
    os._exit(0)


def _end_descendants() -> None:
    """Kill until nothing is left; a process in an uninterruptible system call is waited for, a minute at most."""
    me = psutil.Process()
    until = time.monotonic() + _GIVE_UP_S
    while (children := me.children(recursive=True)) and time.monotonic() < until:
        for child in children:
            with contextlib.suppress(psutil.Error):  # it ended meanwhile
                child.kill()
        time.sleep(0.002)
        _reap()


def _reap() -> dict[int, int]:
    """Wait statuses of the children that have ended."""
    ended: dict[int, int] = {}
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            ended[pid] = status
    return ended


def _prctl(option: int, value: int) -> None:
    if not sys.platform.startswith("linux"):
        return
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")
