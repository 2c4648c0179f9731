"""A reward that scores requests one batch after another: what `mmrl serve-reward` runs behind HTTP. Imports no torch.

Requests wait in a bounded queue. Those that wait together are scored together, up to the reward's batch size; when such
a batch fails, each request is scored by itself, so that none suffers from another's samples.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from typing import Any, Literal

from mmrl_core.contracts import RewardResult, Sample
from mmrl_core.errors import RewardError
from mmrl_core.plugins import Selected
from mmrl_core.rewards.checks import BatchFailedError
from mmrl_core.rewards.executor import SETUP_LIMIT_S
from mmrl_core.rewards.runners import WorkerRunner
from mmrl_core.rewards.wire import PROTOCOL

log = logging.getLogger("mmrl.rewards")


class RefusedError(Exception):
    """A request that is not scored: the queue is full, or the service is not ready, or stops. Another try may help."""


@dataclass(kw_only=True)
class _Job:
    samples: Sequence[Sample]
    until: float
    """The `time.monotonic()` moment after which nobody waits for it."""
    future: Future[list[RewardResult]] = field(default_factory=Future)

    @property
    def wanted(self) -> bool:
        return time.monotonic() < self.until


class RewardService:
    """One reward in a worker process, and the thread that feeds it."""

    def __init__(
        self,
        selected: Selected,
        device: str,
        *,
        deadline_s: float,
        waiting: int,
        batch_size: int | None = None,
        offload: bool = False,
        setup_limit_s: float = SETUP_LIMIT_S,
    ) -> None:
        """
        Args:
            deadline_s: seconds one batch may take before its worker is killed and replaced.
            waiting: requests that may wait; more are refused.
            batch_size: samples a call of the reward; None: the reward's own.
            offload: release the device's memory whenever nothing waits.
        """
        found = selected.found
        self.status: Literal["starting", "ready", "stopping", "failed"] = "starting"
        self.error: RewardError | None = None
        """Why the status is `failed`."""
        self.ended = threading.Event()
        """Set once nothing will be scored any more."""
        options = selected.options
        self.identity = {
            "reward": found.name,
            "distribution": found.distribution,
            "version": found.version,
            "options": None if options is None else options.model_dump(mode="json"),
        }
        self._runner = WorkerRunner(found.name, selected, device, deadline_s=deadline_s, setup_limit_s=setup_limit_s)
        self._batch_size = batch_size
        self._waiting = waiting
        self._offload = offload
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._counts = {"requests": 0, "samples": 0, "failed_samples": 0, "refused_requests": 0}
        self._thread = threading.Thread(target=self._work, name="mmrl-reward-service", daemon=True)

    def start(self) -> None:
        """Start the worker; the reward is set up meanwhile."""
        self._runner.start()
        self._thread.start()

    def health(self) -> dict[str, Any]:
        """What the health check answers."""
        with self._changed:
            return {
                "status": self.status,
                "protocol": PROTOCOL,
                **self.identity,
                "batch_size": self._batch_size,
                "waiting_requests": len(self._jobs),
                "waiting_limit": self._waiting,
                "restarts": self._runner.restarts,
                **self._counts,
            }

    def score(self, samples: Sequence[Sample], seconds: float) -> list[RewardResult]:
        """One result a sample, from any thread. Raises RefusedError, or TimeoutError when `seconds` have passed."""
        job = _Job(samples=samples, until=time.monotonic() + seconds)
        with self._changed:
            self._jobs = deque(waiting for waiting in self._jobs if waiting.wanted)
            if self.status != "ready" or len(self._jobs) >= self._waiting:
                self._counts["refused_requests"] += 1
                busy = f"{len(self._jobs)} requests are waiting already"
                raise RefusedError(busy if self.status == "ready" else f"the service is {self.status}")
            self._counts["requests"] += 1
            self._jobs.append(job)
            self._changed.notify_all()
        try:
            return job.future.result(seconds)
        except FutureTimeoutError:  # TimeoutError itself from Python 3.11 on
            raise TimeoutError from None

    def stop(self, grace_s: float) -> None:
        """Take no new requests, finish those that wait within `grace_s`, refuse the rest, end the worker."""
        with self._changed:
            if self.status in ("starting", "ready"):
                self.status = "stopping"
            self._changed.notify_all()
        if not self.ended.wait(grace_s):
            self._runner.interrupt()
            self.ended.wait(grace_s + 1)
        self._refuse_all("the service is stopping")
        self._runner.close()

    # ----------------------------------------------------------------------------------------------- the feeding thread

    def _work(self) -> None:
        try:
            own = self._runner.setup()
            with self._changed:
                self._batch_size = self._batch_size or own
                if self.status == "starting":
                    self.status = "ready"
            while jobs := self._take():
                self._score(jobs)
        except RewardError as error:
            with self._changed:
                if self.status != "stopping":
                    self.status, self.error = "failed", error
        finally:
            self._refuse_all("the service has ended")
            self.ended.set()

    def _take(self) -> list[_Job]:
        """The next requests that fit into one batch, one at least; none when the service stops and nothing waits."""
        assert self._batch_size is not None
        with self._changed:
            while True:
                while self._jobs and not self._jobs[0].wanted:
                    self._jobs.popleft()
                if self._jobs:
                    break
                if self.status != "ready":
                    return []
                self._changed.wait()
            taken = [self._jobs.popleft()]
            count = len(taken[0].samples)
            while self._jobs and count + len(self._jobs[0].samples) <= self._batch_size:
                job = self._jobs.popleft()
                if job.wanted:
                    taken.append(job)
                    count += len(job.samples)
            return taken

    def _score(self, jobs: Sequence[_Job]) -> None:
        if len(jobs) > 1:
            try:
                together = self._call([sample for job in jobs for sample in job.samples])
            except BatchFailedError as error:
                log.warning("%s: %d requests together: %s; each is scored alone", self._runner.what, len(jobs), error)
            else:
                for job in jobs:
                    count = len(job.samples)
                    self._answer(job, together[:count])
                    together = together[count:]
                return
        for job in jobs:
            self._score_alone(job)

    def _score_alone(self, job: _Job) -> None:
        size = self._batch_size
        assert size is not None
        results: list[RewardResult] = []
        for first in range(0, len(job.samples), size):
            if not job.wanted:
                return
            batch = job.samples[first : first + size]
            try:
                results += self._call(batch)
            except BatchFailedError as error:
                log.warning("%s: %s%s", self._runner.what, error.reason, f"\n{error.details}" if error.details else "")
                results += [RewardResult(failure=error.reason)] * len(batch)
        self._answer(job, results)

    def _call(self, samples: Sequence[Sample]) -> list[RewardResult]:
        with self._changed:
            idle = self._offload and not self._jobs
        return self._runner.score(samples, last=idle)

    def _answer(self, job: _Job, results: list[RewardResult]) -> None:
        with self._changed:
            self._counts["samples"] += len(results)
            self._counts["failed_samples"] += sum(result.failure is not None for result in results)
        job.future.set_result(results)

    def _refuse_all(self, reason: str) -> None:
        with self._changed:
            jobs, self._jobs = self._jobs, deque()
        for job in jobs:
            job.future.set_exception(RefusedError(reason))
