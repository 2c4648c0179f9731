"""Rewards as plain functions: the `@reward` decorator. Imports no torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsFloat, overload

from mmrl_core.contracts import Reward, RewardResult, Sample
from mmrl_core.errors import RewardError


class FunctionReward(Reward):
    """A reward made from a function of one sample."""

    def __init__(self, function: Callable[..., Any], takes_options: bool, options: Any = None) -> None:
        super().__init__(options)
        self._function = function
        self._takes_options = takes_options

    def score(self, samples: Sequence[Sample]) -> list[RewardResult]:
        """Call the function once a sample; an exception or an unusable answer fails that sample only."""
        return [self._score_one(sample) for sample in samples]

    def _score_one(self, sample: Sample) -> RewardResult:
        try:
            value = self._function(sample, self.options) if self._takes_options else self._function(sample)
            return as_result(value)
        except RewardError as error:
            return RewardResult(failure=str(error))
        except Exception as error:  # noqa: BLE001 - a stranger's function: whatever it raises fails this sample
            return RewardResult(failure=f"{type(error).__name__}: {error}")


def as_result(value: Any) -> RewardResult:
    """A function's return value as a RewardResult: a number, a mapping with "score" and sub-scores, or a result.

    Raises RewardError for anything else.
    """
    if isinstance(value, RewardResult):
        return value
    if isinstance(value, Mapping):
        if "score" not in value:
            raise RewardError(f"returned a mapping without 'score': {dict(value)!r}")
        scores = {str(k): _number(v, f"sub-score {k!r}") for k, v in value.items() if k != "score"}
        return RewardResult(value=_number(value["score"], "'score'"), scores=scores)
    return RewardResult(value=_number(value, "a value"))


def _number(value: Any, what: str) -> float:
    """A Python, numpy or one-element tensor number as a float; a numeral in a string is not a number."""
    if not isinstance(value, SupportsFloat):
        raise RewardError(
            f"returned {what} of type {type(value).__name__}; return a number, a mapping with 'score', or "
            "a RewardResult"
        )
    return float(value)


class RewardFunction:
    """What `@reward` leaves in place of the function: callable as before, and constructible by the core."""

    def __init__(self, function: Callable[..., Any], batch_size: int) -> None:
        self.function = function
        self.batch_size = batch_size
        self.__name__ = getattr(function, "__name__", "reward")
        self.__qualname__ = getattr(function, "__qualname__", self.__name__)
        self.__module__ = function.__module__
        self.__doc__ = function.__doc__
        parameters = list(inspect.signature(function).parameters)
        what = f"@reward {self.__name__}({', '.join(parameters)})"
        if len(parameters) not in (1, 2):
            raise RewardError(f"{what}: a reward function takes (sample) or (sample, options)")
        if inspect.iscoroutinefunction(function):
            raise RewardError(f"{what}: a reward function is not async; call asyncio.run inside it")
        if batch_size < 1:
            raise RewardError(f"{what}: batch_size is {batch_size}; it must be at least 1")
        self.takes_options = len(parameters) == 2

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def create(self, options: Any) -> Reward:
        """The Reward with these options."""
        made = FunctionReward(self.function, self.takes_options, options)
        made.batch_size = self.batch_size
        return made


@overload
def reward(function: Callable[..., Any], *, batch_size: int = 64) -> RewardFunction: ...
@overload
def reward(function: None = None, *, batch_size: int = 64) -> Callable[[Callable[..., Any]], RewardFunction]: ...
def reward(
    function: Callable[..., Any] | None = None, *, batch_size: int = 64
) -> RewardFunction | Callable[[Callable[..., Any]], RewardFunction]:
    """Make a reward of a function `(sample) -> float` or `(sample, options) -> float`.

    It may also return a mapping with "score" and named sub-scores, or a `RewardResult`. An exception makes that sample
    *failed*, which the recipe's `on_failure` handles; it never becomes a number.
    """
    if function is None:
        return lambda f: RewardFunction(f, batch_size)
    return RewardFunction(function, batch_size)
