"""Messages between a trainer and a reward worker: eight bytes of length, then the bytes, under one deadline.

Plain sockets instead of `multiprocessing.connection`, because a peer that stops in the middle of a message must not be
able to hold the other side beyond the deadline.
"""

from __future__ import annotations

import socket
import struct
import time

_LENGTH = struct.Struct(">Q")


def send_frame(channel: socket.socket, data: bytes, until: float | None = None) -> None:
    """Send one message. `until` is a `time.monotonic()` moment, or None: no limit.

    Raises TimeoutError after it, EOFError when the peer is gone.
    """
    try:
        for part in (_LENGTH.pack(len(data)), data):
            channel.settimeout(_remaining(until))
            channel.sendall(part)
    except (BrokenPipeError, ConnectionResetError) as error:
        raise EOFError("the peer is gone") from error


def receive_frame(channel: socket.socket, until: float | None = None) -> bytes:
    """Receive one message; see `send_frame` for `until` and the errors."""
    (length,) = _LENGTH.unpack(_receive(channel, _LENGTH.size, until))
    return bytes(_receive(channel, length, until))


def _receive(channel: socket.socket, length: int, until: float | None) -> bytearray:
    buffer = bytearray(length)
    view, filled = memoryview(buffer), 0
    while filled < length:
        channel.settimeout(_remaining(until))
        try:
            count = channel.recv_into(view[filled:])
        except ConnectionResetError as error:
            raise EOFError("the peer is gone") from error
        if count == 0:
            raise EOFError("the peer is gone")
        filled += count
    return buffer


def _remaining(until: float | None) -> float | None:
    if until is None:
        return None
    seconds = until - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("the deadline has passed")
    return seconds
