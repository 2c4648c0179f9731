"""Changing the class of module instances, so that only those in the networks we mean are changed."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn


def swap_after_init(
    original: Callable[..., None], fused: Mapping[type[nn.Module], type[nn.Module]]
) -> Callable[..., None]:
    """An `__init__` after which the modules below that are exactly of a class in `fused` are of the class named there,
    one whose class attribute `armed` says whether it computes in its own way or as the class that it replaces.

    Nothing else of them changes: parameters, buffers, names and the keys of the state dict stay. Its `mmrl_undo` gives
    them their class back, and disarms the fused classes for what it cannot find (copies, modules wrapped since).
    """
    swapped: weakref.WeakSet[nn.Module] = weakref.WeakSet()
    back = {new: old for old, new in fused.items()}
    _arm(back, armed=True)

    @functools.wraps(original)
    def init(self: nn.Module, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        for module in self.modules():
            if type(module) in fused:
                module.__class__ = fused[type(module)]
                swapped.add(module)

    def undo() -> None:
        _arm(back, armed=False)
        for module in swapped:
            if type(module) in back:
                module.__class__ = back[type(module)]
        swapped.clear()

    init.mmrl_undo = undo  # type: ignore[attr-defined]
    return init


def _arm(classes: Mapping[type[nn.Module], type[nn.Module]], *, armed: bool) -> None:
    for cls in classes:
        cls.armed = armed  # type: ignore[attr-defined]
