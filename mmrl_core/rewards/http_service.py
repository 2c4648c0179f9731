"""HTTP in front of a RewardService: `GET /health` and `POST /score`, JSON both ways. Imports no torch."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from mmrl_core.errors import RewardError
from mmrl_core.rewards.service import RefusedError, RewardService
from mmrl_core.rewards.wire import HEALTH, PROTOCOL, SCORE, result_to_json, sample_from_json

log = logging.getLogger("mmrl.rewards")

_READ_S = 30.0
"""Seconds that a client may pause while it sends."""
_SPARE = 16
"""Connections beside those of waiting requests: health checks, and requests about to be refused."""
_OVERLOADED = b"HTTP/1.0 503 Service Unavailable\r\nContent-Type: application/json\r\n\r\n"


class RewardServer(ThreadingHTTPServer):
    """Listens for requests, each in a thread, at most a few more than may wait."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, address: tuple[str, int], service: RewardService, *, deadline_s: float, waiting: int, max_bytes: int
    ) -> None:
        """Bind and listen.

        Args:
            deadline_s: seconds that a request may take when it does not say itself.
            waiting: of the service.
            max_bytes: of a request's body.
        """
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.service, self.deadline_s, self.max_bytes = service, deadline_s, max_bytes
        self._slots = threading.BoundedSemaphore(waiting + _SPARE)
        self._active = 0
        self._idle = threading.Condition()
        super().__init__(address, _Handler)

    @property
    def url(self) -> str:
        """Where clients find it."""
        host, port = self.server_address[:2]
        name = host.decode() if isinstance(host, bytes | bytearray) else str(host)
        return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for it, or refuse it on the spot."""
        if not self._slots.acquire(blocking=False):
            try:
                request.sendall(_OVERLOADED + json.dumps({"error": "too many connections"}).encode())
            except OSError as error:
                log.debug("a refused client is gone: %s", error)
            self.shutdown_request(request)
            return
        with self._idle:
            self._active += 1
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """In the request's own thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()
            with self._idle:
                self._active -= 1
                self._idle.notify_all()

    def finish(self, seconds: float) -> None:
        """Wait for the answers that are being sent, `seconds` at most."""
        until = time.monotonic() + seconds
        with self._idle:
            self._idle.wait_for(lambda: self._active == 0, max(until - time.monotonic(), 0))


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    timeout = _READ_S
    server_version = "mmrl-reward-service"
    sys_version = ""

    def do_GET(self) -> None:
        if self.path.rstrip("/") in (HEALTH, ""):
            self._send(HTTPStatus.OK, self.server.service.health())
        else:
            self._refuse(HTTPStatus.NOT_FOUND, f"there is {HEALTH} (GET) and {SCORE} (POST)")

    def do_POST(self) -> None:
        if self.path.rstrip("/") != SCORE:
            self._refuse(HTTPStatus.NOT_FOUND, f"there is {HEALTH} (GET) and {SCORE} (POST)")
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdigit():
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "a request says its Content-Length")
            return
        if int(length) > self.server.max_bytes:
            limit = f"{self.server.max_bytes >> 20} MiB"
            problem = f"a request of {int(length):,} bytes; the most is {limit}. Send fewer samples at once"
            self._read_away(int(length))
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, problem)
            return
        try:
            message = json.loads(self.rfile.read(int(length)))
            samples, seconds = self._request(message)
        except (RewardError, ValueError, RecursionError) as error:
            self._refuse(HTTPStatus.BAD_REQUEST, f"{error}")
            return
        service = self.server.service
        try:
            results = service.score(samples, seconds)
        except RefusedError as error:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, str(error))
        except TimeoutError:
            self._refuse(HTTPStatus.GATEWAY_TIMEOUT, f"no result within {seconds:g} s")
        else:
            answer = {"protocol": PROTOCOL, **service.identity, "results": [result_to_json(r) for r in results]}
            self._send(HTTPStatus.OK, answer)

    def _request(self, message: Any) -> tuple[list[Any], float]:
        """(samples, seconds). Raises RewardError."""
        if not isinstance(message, dict) or not isinstance(message.get("samples"), list):
            raise RewardError("a request is a JSON object with `protocol` and `samples`")
        if message.get("protocol") != PROTOCOL:
            said = message.get("protocol")
            raise RewardError(f"protocol {said!r}; this service speaks {PROTOCOL}. Install the same mmrl-core")
        seconds = message.get("deadline_s", self.server.deadline_s)
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < 1e6:
            raise RewardError(f"deadline_s {seconds!r} is no positive number of seconds")
        return [sample_from_json(one) for one in message["samples"]], float(seconds)

    def _read_away(self, length: int) -> None:
        """A client that is still sending when the connection closes does not see why it was refused."""
        until = time.monotonic() + _READ_S
        while length > 0 and time.monotonic() < until:
            chunk = self.rfile.read(min(length, 1 << 20))
            if not chunk:
                return
            length -= len(chunk)

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        self._send(status, {"error": reason})

    def _send(self, status: HTTPStatus, message: dict[str, Any]) -> None:
        body = json.dumps(message, allow_nan=False).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except OSError as error:
            log.debug("the client is gone: %s", error)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """One line a request, at level DEBUG."""
        log.debug("%s %s", self.address_string(), format % args)
