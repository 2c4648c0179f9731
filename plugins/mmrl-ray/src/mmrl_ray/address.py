"""Whether there is a cluster at an address, before this process tries to join it.

Imports no ray: which token it uses is settled when it is imported. And its own attempts to join take minutes.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from mmrl_core.errors import PreflightError

_REACH_S = 5.0
_ANSWER_S = 60.0
_CURRENT = Path("ray") / "ray_current_cluster"
"""Below Ray's temporary folder: the file in which `ray start` leaves the address."""


def reach(option: str | None) -> str | None:
    """The address with which to join, once a cluster has answered there; None: start one on this machine.

    Raises PreflightError when there is none, or it does not take this process.
    """
    address = option or os.environ.get("RAY_ADDRESS")
    return None if address is None or address == "local" else _reach(address)


def _reach(address: str) -> str:
    """The address with which to join, once something answers there."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or _current()
    client = address.startswith("ray://")
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator or not port.isdigit():
        raise PreflightError(
            f"launcher ray: address {address!r} is no address of a cluster. Give HOST:PORT as `ray start --head` "
            "printed it, ray://HOST:PORT, auto, or null for a cluster on this machine"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()
    except (OSError, OverflowError) as error:
        started = f"ray start --head --node-ip-address={host} --port={port}"
        raise PreflightError(
            f"launcher ray: no Ray cluster at {address}: {error}. See `ray status --address {host}:{port}` on its head "
            f"node, which is started with `{started}`; name the head's address in launcher.address, never localhost"
        ) from error
    _use_token()
    if not client:
        _check_health(address)
    return address


def _current() -> str:
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # as Ray has it
    file = Path(folder) / _CURRENT
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise PreflightError(
            "launcher ray: address: auto, but this machine belongs to no Ray cluster. Start one with `ray start "
            "--head`, join one with `ray start --address=HOST:PORT`, or name the cluster in launcher.address"
        ) from error


def _use_token() -> None:
    """Ray's own commands use the token that is there; its driver would only do so when told."""
    if "RAY_AUTH_MODE" in os.environ:
        return
    stored = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if "RAY_AUTH_TOKEN" in os.environ or stored.is_file():
        os.environ["RAY_AUTH_MODE"] = "token"


def _check_health(address: str) -> None:
    """Ask in a process of its own: a driver that is refused, or not answered, tries for minutes."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise PreflightError(
            f"launcher ray: something listens at {address}, but does not answer as the head of a Ray cluster within "
            f"{_ANSWER_S:.0f} s. Give the address that `ray start --head` printed (its --port, 6379 by default)"
        ) from error
    if done.returncode == 0:
        return
    said = [line for line in done.stderr.splitlines() if line.strip()]
    if "InvalidAuthToken" in done.stderr:
        raise PreflightError(
            f"launcher ray: the cluster at {address} does not take this process: its authentication token is missing "
            "or another one. Copy ~/.ray/auth_token from the head node, or set RAY_AUTH_TOKEN (`ray get-auth-token`)"
        )
    raise PreflightError(f"launcher ray: the cluster at {address} does not take this process:\n" + "\n".join(said[-3:]))
