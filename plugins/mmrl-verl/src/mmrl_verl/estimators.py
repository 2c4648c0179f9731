"""verl's advantage estimators in mmrl's loop: those that give all tokens of a sample the same advantage."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mmrl_core.contracts import AdvantageEstimator
from mmrl_core.errors import RewardError, nearest
from mmrl_verl.importing import import_verl

if TYPE_CHECKING:
    from mmrl_core.recipe import AdvantageSpec
    from mmrl_verl.algorithm_options import VerlEstimatorOptions

GIVEN = ("token_level_rewards", "response_mask", "index", "epsilon", "norm_adv_by_std_in_grpo", "config")
"""What an estimator may ask for."""
INSTEAD = {"gdpo": "use algorithm.advantage.combine: advantages, which weighs each reward's own advantage"}
SPREAD = 1e-9
"""How far the advantages of one sample's tokens may be apart, relative to the largest: verl sums in various orders."""


def import_registrars(modules: Sequence[str], field: str) -> None:
    """Import verl, and modules that register things with it. Raises RewardError."""
    import_verl()
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:
            raise RewardError(f"{field}.import_modules: cannot import {name!r}: {error}") from error


class VerlEstimator(AdvantageEstimator):
    """`verl.trainer.ppo.core_algos.get_adv_estimator_fn(NAME)` on a step's table."""

    options: VerlEstimatorOptions

    def __init__(self, options: VerlEstimatorOptions, spec: AdvantageSpec) -> None:
        """Raises RewardError when verl has no such estimator, or when it needs what GRPO does not have."""
        super().__init__(options, spec)
        field, name = "algorithm.advantage.plugin", options.estimator
        import_registrars(options.import_modules, field)
        from verl.trainer.config import AlgoConfig
        from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY

        if name not in ADV_ESTIMATOR_REGISTRY:
            known = sorted(ADV_ESTIMATOR_REGISTRY)
            raise RewardError(
                f"{field}: verl has no advantage estimator {name!r}.{nearest(name, known)} It has: {', '.join(known)}"
            )
        self._function = ADV_ESTIMATOR_REGISTRY[name]
        parameters = inspect.signature(self._function).parameters.values()
        keywords = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        needed = {p.name for p in parameters if p.default is p.empty and p.name in keywords}
        missing = sorted(needed - set(GIVEN))
        if missing or name in INSTEAD:
            why = INSTEAD.get(name) or f"it needs {', '.join(missing)}, which GRPO does not have"
            raise RewardError(f"{field}: verl's estimator {name!r} cannot be used here: {why}")
        config = AlgoConfig(adv_estimator=name, norm_adv_by_std_in_grpo=options.normalize_by_std)
        offered = {
            "epsilon": spec.eps,
            "norm_adv_by_std_in_grpo": options.normalize_by_std,
            "config": config,
        }
        self._settings: dict[str, Any] = {key: value for key, value in offered.items() if key in keywords}
        self._takes_index = "index" in keywords or any(p.kind is p.VAR_KEYWORD for p in parameters)

    def advantages(self, rewards: Tensor, group_id: Tensor, lengths: Tensor) -> Tensor:
        """See AdvantageEstimator. Raises RewardError when the tokens of a sample have different advantages."""
        width = max(1, int(lengths.max()))
        mask = (torch.arange(width) < lengths[:, None]).to(torch.float64)
        by_token = torch.zeros(len(rewards), width, dtype=torch.float64)
        by_token[torch.arange(len(rewards)), (lengths - 1).clamp(min=0)] = rewards.double()
        settings = dict(self._settings)
        if self._takes_index:
            settings["index"] = np.array([str(group) for group in group_id.tolist()], dtype=object)
        found, _ = self._function(token_level_rewards=by_token, response_mask=mask, **settings)
        found = found.double()
        first: Tensor = found[:, 0] * mask[:, 0]
        spread = ((found - first[:, None]) * mask).abs().max()
        if float(spread) > SPREAD * max(1.0, float(first.abs().max())):
            raise RewardError(
                f"algorithm.advantage.plugin: verl's estimator {self.options.estimator!r} gives the tokens of a sample "
                f"different advantages (up to {float(spread):.2g} apart); here a sample has one"
            )
        return first
