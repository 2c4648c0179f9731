"""What a reward's answer must look like. The same checks run inline and in a worker. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from mmrl_core.contracts import RewardResult


class BatchFailedError(Exception):
    """A whole batch has no usable answer. Never leaves `mmrl_core.rewards`: it becomes failed samples."""

    def __init__(self, reason: str, *, details: str = "", timed_out: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        """One line for the samples' failure."""
        self.details = details
        """The traceback, when there is one."""
        self.timed_out = timed_out
        """The deadline passed and the worker was killed."""


def check_results(answer: Any, count: int) -> list[RewardResult]:
    """`answer` of `Reward.score` for `count` samples, with plain floats, or why it is unusable.

    A value or sub-score that is NaN or infinite fails its own sample. Anything else that breaks the contract raises
    BatchFailedError, because then nothing says which result belongs to which sample.
    """
    if not isinstance(answer, Sequence) or isinstance(answer, str | bytes):
        raise _broken(f"score() returned {type(answer).__name__}; return a list with one RewardResult a sample")
    if len(answer) != count:
        raise _broken(f"score() returned {len(answer)} results for {count} samples")
    return [_check_one(result, position) for position, result in enumerate(answer)]


def _check_one(result: Any, position: int) -> RewardResult:
    where = f"result {position} of score()"
    if not isinstance(result, RewardResult):
        raise _broken(f"{where} is a {type(result).__name__}; return RewardResult(value=...) or (failure=...)")
    if (result.value is None) == (result.failure is None):
        both = "both a value and a failure" if result.failure is not None else "neither a value nor a failure"
        raise _broken(f"{where} has {both}")
    if not isinstance(result.scores, Mapping):
        raise _broken(f"{where}: scores is a {type(result.scores).__name__}; it maps names to numbers")
    if result.failure is not None:
        if not isinstance(result.failure, str):
            raise _broken(f"{where}: failure is a {type(result.failure).__name__}; it is a sentence")
        return RewardResult(failure=result.failure or "failed without a reason")
    value = _number(result.value, f"{where}: value")
    scores = {str(name): _number(score, f"{where}: sub-score {name!r}") for name, score in result.scores.items()}
    if not math.isfinite(value):
        return RewardResult(failure=f"returned {_spelled(value)}")
    for name, score in scores.items():
        if not math.isfinite(score):
            return RewardResult(failure=f"returned {_spelled(score)} as sub-score {name!r}")
    return RewardResult(value=value, scores=scores)


def _number(value: Any, where: str) -> float:
    if not isinstance(value, Real):  # numpy's scalars are Real; tensors and strings are not
        raise _broken(f"{where} is a {type(value).__name__}; return a Python or numpy number")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _spelled(value: float) -> str:
    return "NaN" if math.isnan(value) else "infinity" if value > 0 else "-infinity"


def _broken(problem: str) -> BatchFailedError:
    return BatchFailedError(f"broke its contract: {problem}")
