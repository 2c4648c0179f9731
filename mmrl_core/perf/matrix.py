"""Which combinations there are: every installed backend with every installed rollout engine, for text and images.

Nothing here knows a backend or an engine by name, so one that a plugin declares is in the matrix once it is installed.
What goes with what is known by the components alone: the rest find out by starting, and say why they cannot.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mmrl_core.errors import PerfError, nearest
from mmrl_core.perf.jobs import MODALITIES, SIZES, Modality, model_folder, recipe_values
from mmrl_core.plugins import Found, Plugins, automatic_word, import_string
from mmrl_core.testing.tiny import write_recipe_file


@dataclass(frozen=True, kw_only=True)
class Combination:
    """One choice of device, backend, rollout engine and modality."""

    device: str
    backend: str
    rollout: str
    modality: Modality
    components: tuple[str, ...]
    """`distribution version` of the plugins that supply them."""
    engine_options: tuple[tuple[str, str], ...] = ()
    """Options of the engine that are not its defaults."""

    @property
    def name(self) -> str:
        """What people call it: cpu+fsdp2+hf+text."""
        return f"{self.device}+{self.backend}+{self.rollout}+{self.modality}"


@dataclass(frozen=True, kw_only=True)
class Unavailable:
    """A combination, or a plugin, that is not measured."""

    name: str
    reason: str
    """Why, and what to do about it where that is known."""


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """What can be tried here, and what cannot."""

    size: str
    tokens: int
    overrides: tuple[str, ...]
    combinations: tuple[Combination, ...]
    unavailable: tuple[Unavailable, ...]

    def part(self, names: Collection[str]) -> Matrix:
        """These combinations alone."""
        return replace(self, combinations=tuple(c for c in self.combinations if c.name in names), unavailable=())

    def make_models(self, folder: Path) -> None:
        """Write or fetch the models before anything is timed."""
        for modality in {c.modality for c in self.combinations}:
            model_folder(self.size, modality, folder)

    def recipe(self, combination: Combination, folder: Path, models: Path) -> tuple[Path, dict[str, Any]]:
        """Write the combination's recipe into `folder`, which is its run folder; its values too. `models` keeps what
        was made for the other combinations."""
        values = recipe_values(
            combination.modality,
            device=combination.device,
            backend=combination.backend,
            rollout={"name": combination.rollout, **dict(combination.engine_options)},
            model=model_folder(self.size, combination.modality, models),
            tokens=self.tokens,
            folder=folder,
        )
        return write_recipe_file(folder / "perf.json", values), values


def discover(
    plugins: Plugins, *, device: str, size: str, tokens: int, overrides: Sequence[str] = (), only: Sequence[str] = ()
) -> Matrix:
    """The matrix of this environment.

    Args:
        device: a word, or `auto`.
        only: patterns of names, with `*`; none: everything.

    Raises PerfError when a pattern fits nothing, PluginError when there is no such device.
    """
    found_device = plugins.get("device", automatic_word("device", device, plugins))
    probe = found_device.probe()
    if not probe.available:
        raise PerfError(f"device {found_device.name!r} cannot run here: {probe.reason}. {probe.cure}".rstrip())
    combinations: list[Combination] = []
    unavailable: list[Unavailable] = []
    for modality in MODALITIES:
        for backend in plugins.found("backend"):
            for engine in plugins.found("rollout"):
                combination = Combination(
                    device=_word(found_device, plugins),
                    backend=_word(backend, plugins),
                    rollout=_word(engine, plugins),
                    modality=modality,
                    components=tuple(
                        sorted({f"{f.distribution} {f.version}" for f in (found_device, backend, engine)})
                    ),
                    engine_options=_own_weights(engine),
                )
                reason = _reason((backend, engine), modality, size)
                if reason is None:
                    combinations.append(combination)
                else:
                    unavailable.append(Unavailable(name=combination.name, reason=reason))
    names = [c.name for c in combinations] + [u.name for u in unavailable]
    for pattern in only:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise PerfError(
                f"--only {pattern!r} fits no combination.{nearest(pattern, names)} There are: {', '.join(names)}"
            )

    def wanted(name: str) -> bool:
        return not only or any(fnmatchcase(name, pattern) for pattern in only)

    broken = [
        Unavailable(name=f"{p.distribution} {p.version}", reason=p.error.strip().splitlines()[-1])
        for p in plugins.plugins
        if p.error is not None
    ]
    return Matrix(
        size=size,
        tokens=tokens,
        overrides=tuple(overrides),
        combinations=tuple(c for c in combinations if wanted(c.name)),
        unavailable=(*(u for u in unavailable if wanted(u.name)), *broken),
    )


def _reason(components: Sequence[Found], modality: Modality, size: str) -> str | None:
    """Why it is not even tried."""
    for found in components:
        probe = found.probe()
        if not probe.available:
            cure = f" Cure: {probe.cure}" if probe.cure else ""
            return f"{found.kind} {found.name!r} ({found.distribution}) cannot run here: {probe.reason}.{cure}"
    if modality not in SIZES[size].models:
        return f"there is no {modality} model of size {size}"
    return None


def _own_weights(engine: Found) -> tuple[tuple[str, str], ...]:
    """Weights of its own for an engine that has the choice: handing them over is a phase then, and can be measured."""
    if engine.component.options is None:
        return ()
    fields = import_string(engine.component.options, f"options of {engine.kind} {engine.name!r}").model_fields
    return (("weights", "own"),) if "weights" in fields else ()


def _word(found: Found, plugins: Plugins) -> str:
    """Its name, with the distribution where that alone tells it from another."""
    homonyms = [f for f in plugins.found(found.kind) if f.name == found.name]
    return found.name if len(homonyms) == 1 else f"{found.distribution}:{found.name}"
