"""Every installed reward of mmrl as a reward function of verl, by its name::

    reward.custom_reward_function.path=pkg://mmrl_verl.rewards
    reward.custom_reward_function.name=brevity
    +reward.custom_reward_function.reward_kwargs.half_life_words=30

An attribute of this module is the function of the reward of that name, `distribution:name` included. What a recipe may
say beside a reward's name goes into `reward_kwargs`: its options, and `run`, `deadline_s`, `retries`, `weight`. As in a
recipe it scores in a process of its own that is killed at the deadline, unless `run: inline`.

verl has no way to leave a sample out, so a reward that fails raises: the run stops, and no number is made up.
"""

from __future__ import annotations

import atexit
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrl_core.contracts import Prompt, Sample
from mmrl_core.errors import RewardError
from mmrl_core.plugins import Selected, load_plugins
from mmrl_core.recipe import RewardChoice
from mmrl_core.rewards.executor import RewardExecutor
from mmrl_core.yaml_source import RecipeSource

NOT_TOLD = ("length", "truncated")
OF_VERL = ("reward_router_address", "reward_model_tokenizer")
"""What verl passes to every reward function when it serves a reward model; rewards of mmrl have models of their own."""


@dataclass(frozen=True, kw_only=True)
class SampleOfVerl(Sample):
    """A sample of which only the text is known."""

    def __getattribute__(self, name: str) -> Any:
        if name in NOT_TOLD:
            raise RewardError(f"verl tells reward functions a response's text, and not its {name}, which is asked for")
        return super().__getattribute__(name)


class ComputeScore:
    """One reward in the form that verl calls. Workers start with the first call, one for each set of options."""

    def __init__(self, name: str) -> None:
        """Raises PluginError when no installed plugin declares a reward of this name."""
        self.name = self.__name__ = name
        self._found = load_plugins().get("reward", name)
        self._executors: dict[str, RewardExecutor] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return ComputeScore, (self.name,)

    def __call__(
        self,
        data_source: str,
        solution_str: str,
        ground_truth: Any,
        extra_info: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> dict[str, float]:
        """`score`, and the reward's sub-scores as `NAME/SUB-SCORE`.

        Rewards see `ground_truth` as the reference answer, `data_source` and what is in `extra_info` as the prompt's
        columns. Raises RewardError when the reward fails, RecipeError when it does not take these settings.
        """
        columns = {"data_source": data_source, **(extra_info or {})}
        prompt = Prompt(index=0, text="", answer=ground_truth, columns=columns, origin=f"verl ({data_source})")
        sample = SampleOfVerl(sample_id=0, group_id=0, prompt=prompt, text=solution_str)
        with self._lock:
            scored = self._executor({k: v for k, v in settings.items() if k not in OF_VERL}).score([sample])[0]
        if scored.value is None:
            raise RewardError(f"{scored.failure}. verl cannot leave a sample out, so the run stops")
        return {"score": scored.value, **scored.sub_scores}

    def _executor(self, settings: Mapping[str, Any]) -> RewardExecutor:
        key = json.dumps(settings, sort_keys=True, default=str)
        if key not in self._executors:
            plain = json.loads(key)
            source = RecipeSource(Path("reward.custom_reward_function.reward_kwargs"), plain, {})
            choice = source.validate(RewardChoice, {"name": self.name, **plain})
            options = self._found.validate(source, choice.options, ())
            executor = RewardExecutor([choice], [Selected(found=self._found, options=options)], "cpu")
            executor.start()
            atexit.register(executor.close)
            executor.setup()
            self._executors[key] = executor
        return self._executors[key]


_functions: dict[str, ComputeScore] = {}


def __getattr__(name: str) -> ComputeScore:
    if name.startswith("__"):
        raise AttributeError(name)
    if name not in _functions:
        _functions[name] = ComputeScore(name)
    return _functions[name]
