"""How a measuring process and its driver talk: one JSON object a line, through a socket in a folder of theirs.

worker -> {"ready": facts}, once it is set up
driver -> {"step": n, "memory": whether to take peaks of memory, "count": whether to count operations}
worker -> {"step": n, "metrics": {...}, "memory": [peaks by phase, one a rank], "flops": of a forward, or null}
the driver closes its end: the worker leaves

While the driver says nothing the worker waits in a read, so several of them can take turns on one machine.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

PROTOCOL = 1
"""Grows when workers of other commits can no longer be driven."""

SOCKET = "perf.sock"
"""Its name in the run folder of the worker."""


class Line:
    """One end of the connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._file = connection.makefile("rw", encoding="utf-8")

    @classmethod
    def to_driver(cls, folder: Path) -> Line:
        """The worker's end; the driver listens in `folder` already."""
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(folder / SOCKET))
        return cls(connection)

    def send(self, message: dict[str, Any]) -> None:
        """One message. Raises BrokenPipeError when the other side has left."""
        self._file.write(json.dumps(message) + "\n")
        self._file.flush()

    def receive(self) -> dict[str, Any] | None:
        """Block until there is a message; None when the other side has left."""
        try:
            text = self._file.readline()
        except ConnectionResetError:
            return None
        message: dict[str, Any] | None = json.loads(text) if text else None
        return message

    def time_out(self, seconds: float) -> None:
        """Let `receive` raise TimeoutError after so long."""
        self._connection.settimeout(seconds)

    def close(self) -> None:
        """Leave."""
        try:
            self._file.close()
        except BrokenPipeError:  # the other side left first, with something unsent on its way
            pass
        finally:
            self._connection.close()
