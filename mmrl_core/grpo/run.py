"""What the loop works with: the components of one rank, set up, and where the run stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mmrl_core.contracts import (
    AdvantageEstimator,
    DeviceOps,
    Policy,
    PolicyGradient,
    PromptSource,
    RolloutEngine,
    Sample,
    TrainingBackend,
)
from mmrl_core.recipe import Recipe
from mmrl_core.world import World

if TYPE_CHECKING:
    from mmrl_core.checkpoint.store import CheckpointStore
    from mmrl_core.grpo.evaluation import Evaluation, Evaluator
    from mmrl_core.metrics.timers import PhaseTimers
    from mmrl_core.rewards.executor import RewardExecutor


class Observers(Protocol):
    """The lifecycle hooks of everything that observes the run; does nothing on ranks other than 0."""

    def run_start(self, recipe: Recipe, run_dir: Path, first_step: int) -> None: ...
    def step_end(self, step: int, metrics: Mapping[str, float], samples: Sequence[Sample]) -> None: ...
    def evaluation_end(self, step: int, metrics: Mapping[str, float], samples: Sequence[Sample]) -> None: ...
    def run_end(self, summary: Mapping[str, Any]) -> None: ...


@dataclass(kw_only=True)
class Progress:
    """Where the run stands: everything beside weights and generators that a resumed run needs. Plain JSON values."""

    step: int = 0
    """Steps done."""
    cursor: int = 0
    """The next prompt's index in the source's endless order."""
    updates: int = 0
    """Optimizer steps done: the policy version."""
    seconds: float = 0.0
    """Wall time of all steps, over all sessions."""
    rewards: list[float] = field(default_factory=list)
    """Mean score of each step."""
    idle_steps: int = 0
    """Steps in a row that found no group to learn from."""
    first_evaluation: dict[str, Any] | None = None
    """What the evaluation before the first step found (Evaluation.summary), if there was one."""


@dataclass(kw_only=True)
class Run:
    """One rank's view of the run."""

    recipe: Recipe
    world: World
    device: DeviceOps
    policy: Policy
    backend: TrainingBackend
    engine: RolloutEngine
    rewards: RewardExecutor
    source: PromptSource
    sampling: Any
    evaluator: Evaluator | None
    """None without an `eval` section."""
    observers: Observers
    timers: PhaseTimers
    store: CheckpointStore
    stop_requested: Callable[[], bool]
    """Collective: whether any rank was told to stop."""
    facts: Mapping[str, Any]
    """What every checkpoint carries, and a resumed run must share: `recipe` (what shapes the result), `data_digest`."""
    estimator: AdvantageEstimator | None = None
    """A plugin's; None: the built-in formulas."""
    policy_gradient: PolicyGradient | None = None
    """A plugin's; None: the built-in ones."""
    progress: Progress = field(default_factory=Progress)
    held_out: tuple[int, Evaluation] | None = None
    """The last evaluation in training, and its step."""
    reward_counters: dict[str, int] = field(default_factory=dict)
    """The executor's counters at the end of the last step."""

    @property
    def directory(self) -> Path:
        """The run folder."""
        return self.recipe.directory
