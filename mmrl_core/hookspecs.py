"""Every hook of mmrl: the whole plugin API in one sitting.

A plugin is an installed distribution with an entry point in the group `mmrl` that names a module (or object)
holding hook implementations::

    # pyproject.toml
    [project.entry-points.mmrl]
    my-plugin = "my_package.plugin"

    # my_package/plugin.py
    from mmrl_core import Component, hookimpl

    mmrl_api = 1

    @hookimpl
    def mmrl_rewards():
        return [Component(name="brevity", summary="Short answers", target="my_package.rewards:brevity")]

Two kinds of hook exist. *Declaring* hooks take nothing and return a list, most of `Component`: names and dotted
strings, so that listing and validating import neither torch nor the plugin's heavy dependencies. *Lifecycle* hooks
observe a run on rank 0; they may change nothing and call no collective.

This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from mmrl_core.contracts import Sample
    from mmrl_core.recipe import Recipe

PROJECT = "mmrl"
ENTRY_POINT_GROUP = "mmrl"
API_VERSION = 1
"""The integer a plugin states as `mmrl_api`. It grows when a hook or a contract changes incompatibly."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True, kw_only=True)
class Component:
    """One named thing that a plugin declares.

    Every reference is a dotted string `"package.module:attribute"`, resolved only when the component is used.
    """

    name: str
    """The word users write in a recipe: lower case letters, digits, `-`, `_`."""
    summary: str
    """One line for `mmrl plugins`."""
    target: str
    """The class (or, for rewards, the function decorated with `@reward`) that implements the contract."""
    options: str | None = None
    """A pydantic model of the component's options. Its module must import no torch. None: no options."""
    probe: str | None = None
    """A function `() -> Probe` that says whether the component can run here, cheaply and without heavy imports."""
    sampling: str | None = None
    """Policies only: a pydantic model of the recipe's `sampling` section. Its module must import no torch."""
    environment: str | None = None
    """Devices only: a function `(recipe, *, ranks, nodes) -> Sequence[EnvironmentVariable]` that says what a run of
    `recipe` should find in its environment, with `ranks` on each of `nodes` machines. Its module must import no
    torch."""


@dataclass(frozen=True, kw_only=True)
class EnvironmentVariable:
    """A variable that a device's vendor recommends for a run. `mmrl env` prints them."""

    name: str
    """The variable's name."""
    value: str
    """What it should be."""
    reason: str
    """What it is good for, in one line."""
    extends: bool = False
    """The variable is a list with colons, such as LD_PRELOAD: `value` is added to what it holds already."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A probe's answer."""

    available: bool
    reason: str = ""
    """Why not, or a detail worth showing (a version, a device name)."""
    cure: str = ""
    """The command or step that makes it available."""


@dataclass(frozen=True, kw_only=True)
class Patch:
    """A change to other people's code that a plugin makes while a run needs it, and takes back afterwards.

    Declaring one changes nothing: the plugin applies it with `mmrl_core.patches`, and `mmrl doctor` lists it.
    """

    name: str
    """What people call it: lower case letters, digits, `-`, `_`. Unique within the plugin."""
    targets: tuple[str, ...]
    """What is replaced: `"package.module:attribute"`, each imported only when the patch is applied. `Class.method` and
    `function.__code__` are attributes too; the last also reaches modules that imported the function by name."""
    replacement: str
    """A function `(original) -> replacement`, called once a target with what stands there."""
    reason: str
    """What goes wrong without it, in one line."""
    distribution: str
    """The distribution whose code is changed."""
    versions: str
    """Its versions that the patch was made for, as pip writes them: `">=0.35,<0.38"`."""
    devices: tuple[str, ...] = ()
    """Kinds of device it is for (`DeviceOps.name`); none: all."""
    upstream: str = ""
    """Where the cause is reported or repaired, or nothing."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Something about this machine that a plugin's users want to know, asked by `mmrl doctor`."""

    name: str
    """What it is about: `megatron-core`."""
    probe: str
    """A function `() -> Probe`, cheap and without heavy imports. `reason` says what was found, or what is wrong."""


class DeclaringHooks:
    """One hook per seam. Each is called once per plugin, by itself, and its exceptions are attributed to it."""

    @hookspec
    def mmrl_device_ops(self) -> Sequence[Component]:  # type: ignore[empty-body]
        """Declare devices; each target is a `mmrl_core.contracts.DeviceOps`."""

    @hookspec
    def mmrl_training_backends(self) -> Sequence[Component]:  # type: ignore[empty-body]
        """Declare training backends; each target is a `mmrl_core.contracts.TrainingBackend`."""

    @hookspec
    def mmrl_rollout_engines(self) -> Sequence[Component]:  # type: ignore[empty-body]
        """Declare rollout engines; each target is a `mmrl_core.contracts.RolloutEngine`."""

    @hookspec
    def mmrl_rewards(self) -> Sequence[Component]:  # type: ignore[empty-body]
        """Declare rewards; each target is a `mmrl_core.contracts.Reward` or a function decorated with `@reward`."""

    @hookspec
    def mmrl_policies(self) -> Sequence[Component]:  # type: ignore[empty-body]
        """Declare model families; each target is a `mmrl_core.contracts.Policy`."""

    @hookspec
    def mmrl_launchers(self) -> Sequence[Component]:  # type: ignore[empty-body]
        """Declare launchers; each target is a `mmrl_core.contracts.Launcher`."""

    @hookspec
    def mmrl_prompt_sources(self) -> Sequence[Component]:  # type: ignore[empty-body]
        """Declare prompt sources; each target is a `mmrl_core.contracts.PromptSource`."""

    @hookspec
    def mmrl_writers(self) -> Sequence[Component]:  # type: ignore[empty-body]
        """Declare metric writers; each target is a class whose instances implement lifecycle hooks."""

    @hookspec
    def mmrl_weight_formats(self) -> Sequence[Component]:  # type: ignore[empty-body]
        """Declare formats of weights in folders; each target is a `mmrl_core.contracts.WeightFormat`."""

    @hookspec
    def mmrl_patches(self) -> Sequence[Patch]:  # type: ignore[empty-body]
        """Declare changes to other people's code; nothing is changed by declaring them. A list of `Patch`."""

    @hookspec
    def mmrl_diagnoses(self) -> Sequence[Diagnosis]:  # type: ignore[empty-body]
        """Declare what `mmrl doctor` should look at beside the plugin's components. A list of `Diagnosis`."""


class LifecycleHooks:
    """Observers of a run, called on rank 0 only, once a step at most, never inside the micro-batch loop."""

    @hookspec
    def mmrl_run_start(self, recipe: Recipe, run_dir: str, first_step: int) -> None:
        """The run is about to start at step `first_step` (1, or more after a resume)."""

    @hookspec
    def mmrl_step_end(self, step: int, metrics: Mapping[str, float], samples: Sequence[Sample]) -> None:
        """A step ended. `metrics` are final for the step; `samples` are some of rank 0's decoded samples, as many as
        `show_samples` of the recipe says, with their scores."""

    @hookspec
    def mmrl_evaluation_end(self, step: int, metrics: Mapping[str, float], samples: Sequence[Sample]) -> None:
        """A held-out evaluation during the run ended: of the weights after `step`, or, with step 0, before training.

        `metrics` are those of the evaluation. `samples` are some of rank 0's decoded samples: each time of the same
        prompts, with the same seeds, so that they can be compared. It is called before `mmrl_step_end` of that step,
        whose metrics repeat the evaluation's; step 0 has no `mmrl_step_end`. The evaluation at the end of a run whose
        last step was not due for one comes after that step's.
        """

    @hookspec
    def mmrl_run_end(self, summary: Mapping[str, Any]) -> None:
        """The run ended, normally or not: `summary["outcome"]` says which."""
