"""From what a user wrote to what is run: no `auto`, no unsaid default, nothing unavailable. Imports no torch."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel

from mmrl_core.errors import PluginError
from mmrl_core.plugins import Plugins, Selected, Selection
from mmrl_core.recipe import Choice, Recipe

AnyChoice = TypeVar("AnyChoice", bound=Choice)


def complete(recipe: Recipe, selection: Selection, plugins: Plugins) -> Recipe:
    """The recipe with the words that `auto` stands for and every option of every component, defaults included.

    It means the same as `recipe` on this machine, and goes on meaning it when defaults change.
    """

    def full(choice: AnyChoice, selected: Selected) -> AnyChoice:
        word = choice.name if choice.name != "auto" else _word(selected, plugins)
        return choice.model_copy(update={"name": word, "options": _values(selected.options, choice.options)})

    update: dict[str, Any] = {
        "device": full(recipe.device, selection.device),
        "launcher": full(recipe.launcher, selection.launcher),
        "model": recipe.model.model_copy(update={"policy": full(recipe.model.policy, selection.policy)}),
        "backend": full(recipe.backend, selection.backend),
        "rollout": full(recipe.rollout, selection.rollout),
        "sampling": _values(selection.sampling, recipe.sampling),
        "data": full(recipe.data, selection.data),
        "rewards": [full(c, s) for c, s in zip(recipe.rewards, selection.rewards, strict=True)],
        "writers": [full(c, s) for c, s in zip(recipe.writers, selection.writers, strict=True)],
    }
    if recipe.eval is not None:
        assert selection.eval_data is not None
        update["eval"] = recipe.eval.model_copy(
            update={
                "data": full(recipe.eval.data, selection.eval_data),
                "sampling": _values(selection.eval_sampling, recipe.eval.sampling),
            }
        )
    return recipe.model_copy(update=update)


def unavailable(selection: Selection) -> list[str]:
    """One line for each component of the selection whose probe says that it cannot run here."""
    lines = []
    for selected in selection.all():
        probe = selected.found.probe()
        if not probe.available:
            found = selected.found
            cure = f" Cure: {probe.cure}" if probe.cure else ""
            lines.append(f"{found.kind} {found.name!r} ({found.distribution}) cannot run here: {probe.reason}.{cure}")
    return list(dict.fromkeys(lines))


def require_available(selection: Selection) -> None:
    """Raise PluginError naming every component of the selection that cannot run here, why, and the cure."""
    lines = unavailable(selection)
    if lines:
        raise PluginError("\n".join(lines))


def _word(selected: Selected, plugins: Plugins) -> str:
    found = selected.found
    homonyms = [f for f in plugins.found(found.kind) if f.name == found.name]
    return found.name if len(homonyms) == 1 else f"{found.distribution}:{found.name}"


def _values(validated: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Validated options as plain values; `given` for a component without options."""
    return validated.model_dump(mode="json") if isinstance(validated, BaseModel) else dict(given)
