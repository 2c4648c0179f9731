"""Runs a recipe's rewards for one rank and combines their answers. Imports no torch."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType

from mmrl_core.contracts import RewardResult, Sample
from mmrl_core.errors import RewardError
from mmrl_core.plugins import Selected
from mmrl_core.recipe import DEFAULT_DEADLINE_S, RewardChoice
from mmrl_core.rewards.checks import BatchFailedError
from mmrl_core.rewards.runners import InlineRunner, Runner, WorkerRunner

log = logging.getLogger("mmrl.rewards")

SETUP_LIMIT_S = 600.0
"""Seconds a worker may take from its start until its reward is set up. Not part of a batch's deadline."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What all rewards together say about one sample."""

    value: float | None
    """Weighted sum over the rewards; None when any of them failed."""
    failure: str | None
    """Which rewards failed and why; None when none did."""
    drop_group: bool
    """A reward with `on_failure: drop_group` failed: the sample's whole group leaves the step."""
    per_reward: Mapping[str, float] = field(default_factory=dict)
    """Unweighted value by the reward's name in metrics, of the rewards that did not fail."""
    sub_scores: Mapping[str, float] = field(default_factory=dict)
    """Named sub-scores, `reward/name`."""


class RewardExecutor:
    """The recipe's rewards on one rank: `start`, then (once communication is set up or not) `setup`, then `score`.

    A worker that was killed at its deadline, or that died, is replaced at once; the replacement is set up while the
    trainer goes on. A replacement that cannot be set up stops the run: a reward that is gone is not a failed sample.
    """

    def __init__(
        self,
        choices: Sequence[RewardChoice],
        selected: Sequence[Selected],
        device: str,
        *,
        setup_limit_s: float = SETUP_LIMIT_S,
    ) -> None:
        """`choices` and `selected` belong together, in order. `device` is the rank's own torch device string, for
        rewards whose recipe says `device: auto`."""
        assert len(choices) == len(selected)
        self._choices = tuple(choices)
        self._runners: list[Runner] = []
        for choice, one in zip(choices, selected, strict=True):
            place = device if choice.device == "auto" else choice.device
            if choice.run == "inline":
                self._runners.append(InlineRunner(choice.shown_name, one, place))
            else:
                deadline = DEFAULT_DEADLINE_S if choice.deadline_s is None else choice.deadline_s
                self._runners.append(
                    WorkerRunner(choice.shown_name, one, place, deadline_s=deadline, setup_limit_s=setup_limit_s)
                )
        self._batch_sizes: list[int] = []
        self._pool: ThreadPoolExecutor | None = None
        self._logged: set[str] = set()
        self.last_seconds: dict[str, float] = {}
        """Wall-clock seconds each reward took in the last `score`; workers overlap."""
        self.failures: dict[str, int] = {choice.shown_name: 0 for choice in choices}
        """Failed samples by reward, after retries, since the start."""
        self.timeouts: dict[str, int] = {choice.shown_name: 0 for choice in choices}
        """Batches that were killed at the deadline, by reward, retries included."""

    @property
    def restarts(self) -> dict[str, int]:
        """Workers started to replace one that was killed or died, by reward."""
        return {runner.label: runner.restarts for runner in self._runners}

    def counters(self) -> dict[str, int]:
        """`failures` (samples), `timeouts` (batches) and `restarts` (workers) of all rewards since the start."""
        totals = {"failures": self.failures, "timeouts": self.timeouts, "restarts": self.restarts}
        return {name: sum(by_reward.values()) for name, by_reward in totals.items()}

    @property
    def worker_pids(self) -> dict[str, int]:
        """Process ids of the running workers' guards, by reward."""
        workers = [r for r in self._runners if isinstance(r, WorkerRunner)]
        return {r.label: r.pid for r in workers if r.pid is not None}

    def start(self) -> None:
        """Start one process for each `run: worker` reward; a second call does nothing.

        Must be called before any communication is set up, so that no worker inherits a part of it.
        """
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=len(self._runners), thread_name_prefix="mmrl-reward")
            for runner in self._runners:
                runner.start()

    def setup(self) -> None:
        """Wait until every reward is set up (workers do it at the same time).

        Raises RewardError with the reward's traceback when one fails or takes longer than the set-up limit.
        """
        assert self._pool is not None, "start() comes first"
        for choice, runner in zip(self._choices, self._runners, strict=True):
            own = runner.setup()
            size = own if choice.batch_size is None else choice.batch_size
            if size < 1:
                raise RewardError(f"{runner.what}: its batch_size is {size}; it must be at least 1")
            self._batch_sizes.append(size)

    def score(self, samples: Sequence[Sample]) -> list[Scored]:
        """One Scored a sample, in order. Workers score at the same time as each other and as the inline rewards.

        Raises RewardError when a reward with `on_failure: stop` fails, or a worker cannot be replaced; after any
        exception the executor can only be closed.
        """
        assert self._pool is not None, "start() comes first"
        assert self._batch_sizes, "setup() comes first"
        indices = range(len(self._runners))
        answers: dict[int, list[RewardResult]] = {}
        futures: dict[int, Future[list[RewardResult]]] = {}
        try:
            for i in indices:
                if isinstance(self._runners[i], WorkerRunner):
                    futures[i] = self._pool.submit(self._run, i, samples)
            for i in indices:  # inline in this thread: some libraries insist on the main one
                if i not in futures:
                    answers[i] = self._run(i, samples)
            for i, future in futures.items():
                answers[i] = future.result()
        except BaseException:
            self._interrupt(list(futures.values()))
            raise
        return [self._combine([answers[i][row] for i in indices]) for row in range(len(samples))]

    def close(self) -> None:
        """End every worker and all that they started. A second call does nothing."""
        for runner in self._runners:
            runner.close()
        if self._pool is not None:
            self._pool.shutdown()

    def __enter__(self) -> RewardExecutor:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:  # fmt: skip
        self.close()

    def _run(self, index: int, samples: Sequence[Sample]) -> list[RewardResult]:
        """One reward over all samples, batch by batch, with retries."""
        choice, runner = self._choices[index], self._runners[index]
        begin = time.perf_counter()
        size = self._batch_sizes[index]
        results: list[RewardResult] = []
        for first in range(0, len(samples), size):
            last = first + size >= len(samples)
            results.extend(self._run_batch(choice, runner, samples[first : first + size], last))
        self.last_seconds[choice.shown_name] = time.perf_counter() - begin
        return results

    def _run_batch(
        self, choice: RewardChoice, runner: Runner, samples: Sequence[Sample], last: bool
    ) -> list[RewardResult]:  # fmt: skip
        """Results of one batch. What failed is scored again, `retries` times."""
        results: list[RewardResult | None] = [None] * len(samples)
        pending = list(range(len(samples)))
        for _ in range(1 + choice.retries):
            try:
                answer = runner.score([samples[i] for i in pending], last=last)
            except BatchFailedError as error:
                self.timeouts[choice.shown_name] += error.timed_out
                self._log(runner, error)
                answer = [RewardResult(failure=error.reason)] * len(pending)
            for i, result in zip(pending, answer, strict=True):
                results[i] = result
            pending = [i for i, result in zip(pending, answer, strict=True) if result.failure is not None]
            if not pending:
                break
        final = [result for result in results if result is not None]
        assert len(final) == len(samples)
        self.failures[choice.shown_name] += len(pending)
        if pending and choice.on_failure == "stop":
            sample = samples[pending[0]]
            origin = sample.prompt.origin or f"prompt {sample.prompt.index}"
            raise RewardError(
                f"{runner.what} failed for {len(pending)} of {len(samples)} samples and on_failure is `stop`. "
                f"First: sample {sample.sample_id} of {origin}: {final[pending[0]].failure}"
            )
        return final

    def _log(self, runner: Runner, error: BatchFailedError) -> None:
        """The first time a reason appears, with its traceback; after that the counters tell."""
        message = f"{runner.what}: a batch failed: {error.reason}"
        if message not in self._logged:
            self._logged.add(message)
            log.warning("%s%s", message, f"\n{error.details.rstrip()}" if error.details else "")

    def _combine(self, results: Sequence[RewardResult]) -> Scored:
        total, drop_group = 0.0, False
        failures: list[str] = []
        per_reward: dict[str, float] = {}
        sub_scores: dict[str, float] = {}
        for choice, runner, result in zip(self._choices, self._runners, results, strict=True):
            if result.value is None:
                failures.append(f"{runner.what}: {result.failure}")
                drop_group = drop_group or choice.on_failure == "drop_group"
                continue
            total += choice.weight * result.value
            per_reward[choice.shown_name] = result.value
            sub_scores.update({f"{choice.shown_name}/{name}": score for name, score in result.scores.items()})
        return Scored(
            value=None if failures else total,
            failure="; ".join(failures) or None,
            drop_group=drop_group,
            per_reward=per_reward,
            sub_scores=sub_scores,
        )

    def _interrupt(self, futures: Sequence[Future[list[RewardResult]]]) -> None:
        """End the workers that still score, so that no thread of ours outlives an error or a Ctrl-C."""
        for runner in self._runners:
            if isinstance(runner, WorkerRunner):
                runner.interrupt()
        for future in futures:
            future.exception()
