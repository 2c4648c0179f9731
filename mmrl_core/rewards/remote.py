"""`remote`: a reward that runs in a service (`mmrl serve-reward`). Imports no torch.

Whatever goes wrong on the way fails the batch with one line that names the service, within `timeout_s`.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from mmrl_core.contracts import Reward, RewardResult, Sample
from mmrl_core.errors import RewardError
from mmrl_core.rewards.checks import BatchFailedError
from mmrl_core.rewards.options import RemoteOptions
from mmrl_core.rewards.wire import HEALTH, PROTOCOL, SCORE, results_from_json, sample_to_json

log = logging.getLogger("mmrl.rewards")

MAX_ANSWER = 64 << 20
"""Bytes of an answer that are read at most."""
_HEALTH_S = 5.0
_POLL_S = 0.5
_MARGIN_S = 0.2
"""What the service is left to say that it was too slow, before we hang up."""
_BUSY = (502, 503, 504)
"""Statuses that a later attempt may not get: of a proxy without a service, of a full queue, of one that stops."""
IDENTITY = ("reward", "distribution", "version", "options")
"""Fields of the health answer that must stay as they were found."""


class _Unreachable(Exception):
    """Nothing came back, or that it is worth trying again."""


class RemoteReward(Reward):
    """Sends samples to a service and gives back its results."""

    options: RemoteOptions

    def __init__(self, options: RemoteOptions) -> None:
        super().__init__(options)
        self.batch_size = options.samples_per_request
        self._identity: dict[str, Any] | None = None

    def setup(self, device: str) -> None:
        """Wait for the service and see that it is the right one. Raises RewardError.

        `device` is not used: the service has its own.
        """
        until = time.monotonic() + self.options.start_wait_s
        while True:
            try:
                health = self._exchange("GET", HEALTH, None, _HEALTH_S)
                problem = None if health.get("status") == "ready" else f"it is {health.get('status')!r}, not ready"
            except _Unreachable as error:
                health, problem = {}, str(error)
            if problem is None:
                break
            if time.monotonic() + _POLL_S > until:
                raise RewardError(
                    f"the reward service at {self.options.url} is not there after {self.options.start_wait_s:g} s: "
                    f"{problem}. Start it with `mmrl serve-reward`, or correct the option url"
                )
            time.sleep(_POLL_S)
        self._check(health)
        self._identity = {name: health.get(name) for name in IDENTITY}
        log.info("reward service at %s: %s", self.options.url, self._identity)

    def score(self, samples: Sequence[Sample]) -> list[RewardResult]:
        """One result a sample. A sample that cannot be sent has failed; the others are scored without it."""
        results: dict[int, RewardResult] = {}
        messages: list[dict[str, Any]] = []
        sent: list[int] = []
        for row, sample in enumerate(samples):
            try:
                messages.append(sample_to_json(sample, self.options.columns))
                sent.append(row)
            except RewardError as error:
                results[row] = RewardResult(failure=str(error))
        if sent:
            try:
                answers = results_from_json(self._ask(messages), len(sent))
            except RewardError as error:
                raise BatchFailedError(f"the reward service at {self.options.url}: {error}") from error
            results.update(zip(sent, answers, strict=True))
        return [results[row] for row in range(len(samples))]

    # --------------------------------------------------------------------------------------------------------- asking

    def _ask(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """The service's answer, after some attempts. Raises RewardError."""
        options = self.options
        until = time.monotonic() + options.timeout_s
        wait = options.retry_wait_s
        for attempt in range(1 + options.retries):
            left = until - time.monotonic()
            body = {"protocol": PROTOCOL, "samples": messages, "deadline_s": max(left - _MARGIN_S, left / 2)}
            try:
                answer = self._exchange("POST", SCORE, json.dumps(body, allow_nan=False).encode(), left)
                break
            except _Unreachable as error:
                left = until - time.monotonic()
                if attempt == options.retries or left <= wait:
                    tried = f" ({attempt + 1} attempts)" if attempt else ""
                    raise RewardError(f"{error}{tried}") from error
            time.sleep(wait)
            wait *= 2
        identity = {name: answer.get(name) for name in IDENTITY}
        if self._identity is not None and identity != self._identity:
            first = self._identity
            changed = "; ".join(f"{n} {first[n]!r} -> {identity[n]!r}" for n in IDENTITY if identity[n] != first[n])
            raise RewardError(f"it serves something else than at the start of the run: {changed}")
        return answer

    def _exchange(self, method: str, path: str, body: bytes | None, timeout_s: float) -> dict[str, Any]:
        """One request and its JSON answer, within `timeout_s`. Raises _Unreachable, or RewardError for a refusal."""
        place = urlsplit(self.options.url)
        kind = http.client.HTTPSConnection if place.scheme == "https" else http.client.HTTPConnection
        try:
            connection = kind(place.hostname or "", place.port, timeout=timeout_s)
        except ValueError as error:
            raise RewardError(f"url {self.options.url}: {error}") from error
        begin = time.monotonic()
        try:
            with contextlib.closing(connection):
                connection.connect()
                with _cut_off(connection.sock, begin + timeout_s):
                    headers = {"Content-Type": "application/json"}
                    connection.request(method, place.path.rstrip("/") + path, body, headers)
                    response = connection.getresponse()
                    data = response.read(MAX_ANSWER + 1)
        except (OSError, http.client.HTTPException) as error:
            if time.monotonic() - begin >= timeout_s:
                raise _Unreachable(f"no answer within {timeout_s:.3g} s") from error
            raise _Unreachable(f"{type(error).__name__}: {error}") from error
        if time.monotonic() - begin >= timeout_s and response.status == http.client.OK:
            raise _Unreachable(f"no answer within {timeout_s:.3g} s")
        return _answer(response.status, data)

    def _check(self, health: dict[str, Any]) -> None:
        """Whether the service is what the options ask for. Raises RewardError."""
        url, wanted = self.options.url, self.options
        if health.get("protocol") != PROTOCOL:
            raise RewardError(
                f"the service at {url} speaks protocol {health.get('protocol')!r}, this mmrl-core {PROTOCOL}. Install "
                "the same mmrl-core on both sides"
            )
        name, version = health.get("reward"), str(health.get("version"))
        if wanted.reward is not None and wanted.reward != name:
            raise RewardError(f"the service at {url} serves the reward {name!r}, not {wanted.reward!r}")
        if wanted.version is not None:
            try:
                fits = SpecifierSet(wanted.version).contains(Version(version), prereleases=True)
            except InvalidVersion:
                fits = False
            if not fits:
                raise RewardError(
                    f"the service at {url} serves {name!r} of {health.get('distribution')} {version}; the recipe wants "
                    f"version {wanted.version}"
                )


@contextlib.contextmanager
def _cut_off(channel: socket.socket, until: float) -> Iterator[None]:
    """Within the block the connection lives no longer than `until`: a time-out of the socket alone begins again with
    every byte that a slow service sends."""

    def cut() -> None:
        with contextlib.suppress(OSError):  # closed meanwhile
            channel.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(max(until - time.monotonic(), 0), cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _answer(status: int, data: bytes) -> dict[str, Any]:
    """The JSON object of a good answer. Raises _Unreachable when another attempt may help, else RewardError."""
    if len(data) > MAX_ANSWER:
        raise RewardError(f"an answer of more than {MAX_ANSWER >> 20} MiB")
    try:
        answer = json.loads(data)
    except ValueError:
        answer = None
    said = answer.get("error") if isinstance(answer, dict) else None
    if status != http.client.OK:
        reason = f"status {status}: {said or data[:200].decode(errors='replace') or 'without a reason'}"
        if status in _BUSY:
            raise _Unreachable(reason)
        raise RewardError(reason)
    if not isinstance(answer, dict):
        raise RewardError(f"an answer that is no JSON object: {data[:80]!r}")
    return answer
