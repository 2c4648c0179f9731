"""From a selected component to a Reward object. Imports no torch."""

from __future__ import annotations

import inspect

from mmrl_core.contracts import Reward
from mmrl_core.errors import PluginError
from mmrl_core.plugins import Selected
from mmrl_core.rewards.function import RewardFunction
from mmrl_core.vector_math import resolve_vector_math


def create_reward(selected: Selected) -> Reward:
    """Import the target and construct the reward with its options.

    Raises PluginError when the target cannot be imported or is neither a `Reward` subclass nor a function decorated
    with `@reward`. What the constructor raises passes through.
    """
    target = selected.found.load()
    resolve_vector_math()  # a network computes its first score as it computes the others
    if isinstance(target, RewardFunction):
        return target.create(selected.options)
    found = selected.found
    what = f"reward {found.name!r} of {found.distribution} {found.version}: target {found.component.target!r}"
    if isinstance(target, type) and issubclass(target, Reward):
        if inspect.isabstract(target):
            missing = ", ".join(sorted(target.__abstractmethods__))
            raise PluginError(f"{what} is an abstract class. Cure: implement {missing}")
        return target(selected.options)
    if inspect.isfunction(target):
        raise PluginError(
            f"{what} is a plain function. Cure: decorate it with `@reward` (from mmrl_core import reward)"
        )
    kind = f"the class {target.__name__}" if isinstance(target, type) else f"an object of type {type(target).__name__}"
    raise PluginError(
        f"{what} is {kind}; it must be a subclass of mmrl_core.Reward or a function decorated with `@reward`"
    )
