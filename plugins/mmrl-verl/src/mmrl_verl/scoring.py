"""The reward `verl`: verl's own reward functions, and files that hold a `compute_score` for it."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmrl_core.contracts import Reward, RewardResult, Sample
from mmrl_core.errors import RewardError
from mmrl_core.rewards.function import FunctionReward
from mmrl_verl.importing import import_verl

if TYPE_CHECKING:
    from mmrl_verl.options import VerlRewardOptions


class VerlReward(Reward):
    """`compute_score(data_source, solution_str, ground_truth, extra_info)` of each sample.

    `ground_truth` is the prompt's reference answer, `data_source` and `extra_info` are columns of its data row. A
    number is the reward; of a mapping `score` is, and its other numbers are sub-scores. An exception fails the sample.
    """

    options: VerlRewardOptions

    def setup(self, device: str) -> None:
        """Import the function. Raises RewardError."""
        self._function = function_of(self.options.compute_score)

    def score(self, samples: Sequence[Sample]) -> Sequence[RewardResult]:
        """One result a sample, in order."""
        return FunctionReward(self._answer, takes_options=False).score(samples)

    def _answer(self, sample: Sample) -> float | dict[str, float]:
        """What the function says of one sample, of a mapping the numbers. Raises RewardError, or what it raises."""
        columns = sample.prompt.columns
        source = self.options.data_source or columns.get("data_source")
        if source is None:
            raise RewardError(f"{sample.prompt.origin}: the row has no column data_source; set the reward's option")
        if sample.text is None:
            raise RewardError("the sample has no text; reward verl scores text policies only")
        answer = self._function(
            data_source=source,
            solution_str=sample.text,
            ground_truth=sample.answer,
            # a copy: verl's reward functions may write into it
            extra_info=dict(columns.get("extra_info") or {}),
            **self.options.reward_kwargs,
        )
        if not isinstance(answer, Mapping):
            return float(answer)
        return {name: float(value) for name, value in answer.items() if isinstance(value, bool | int | float)}


def function_of(named: str | None) -> Callable[..., Any]:
    """verl's own function for None; else that of `FILE.py:FUNCTION` or `MODULE:FUNCTION`. Raises RewardError."""
    if named is None:
        import_verl()
        from verl.utils.reward_score import default_compute_score

        own: Callable[..., Any] = default_compute_score
        return own
    place, _, attribute = named.rpartition(":")
    try:
        module = _file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:
        raise RewardError(f"reward verl: compute_score {named!r}: {type(error).__name__}: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise RewardError(f"reward verl: compute_score {named!r}: {place} has no function {attribute!r}")
    if inspect.iscoroutinefunction(function):
        raise RewardError(f"reward verl: compute_score {named!r} is async; call asyncio.run inside it")
    found: Callable[..., Any] = function
    return found


def _file(path: Path) -> Any:
    """A module from a file that the recipe's author names and trusts."""
    spec = importlib.util.spec_from_file_location(f"compute_score_of_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
