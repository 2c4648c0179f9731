"""Changing other people's code for as long as a run needs it, and leaving it exactly as it was. Imports no torch.

A plugin declares its patches (`mmrl_patches`) and applies them itself, at set-up, never at import:

    with apply(patches, device="cpu"):
        ...

`verdict` says whether a patch applies here, from version numbers alone: nothing of the patched library is imported.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from packaging.specifiers import SpecifierSet

from mmrl_core.errors import PatchError
from mmrl_core.hookspecs import Patch

UNDO = "mmrl_undo"
"""Attribute of a replacement: a function without arguments that takes back what the replacement did to objects it met
(instances whose class it changed, say). Called before the originals are put back."""

_MISSING = object()


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a patch applies, and why or why not."""

    applies: bool
    reason: str


def verdict(patch: Patch, device: str | None = None) -> Verdict:
    """Whether `patch` fits the installed distribution and, unless it is None, the kind of device."""
    try:
        version = importlib.metadata.version(patch.distribution)
    except importlib.metadata.PackageNotFoundError:
        return Verdict(applies=False, reason=f"{patch.distribution} is not installed")
    if device is not None and patch.devices and device not in patch.devices:
        return Verdict(applies=False, reason=f"it is for device {' or '.join(patch.devices)}, not {device}")
    if not SpecifierSet(patch.versions).contains(version, prereleases=True):
        return Verdict(applies=False, reason=f"{patch.distribution} {version} is not in {patch.versions}")
    return Verdict(applies=True, reason=f"{patch.distribution} {version} is in {patch.versions}")


def apply(patches: Sequence[Patch], *, device: str) -> Applied:
    """Apply those of `patches` that fit, in order; the handle says which, and takes them back.

    A patch that is already in force is counted, not applied twice: it goes when the last handle that holds it is
    reverted. Raises PatchError, with everything undone, when a target of a fitting patch is missing.
    """
    handle = Applied()
    for patch in patches:
        said = verdict(patch, device)
        if not said.applies:
            handle.skipped[patch.name] = said.reason
            continue
        try:
            _hold(patch)
        except BaseException:
            handle.revert()
            raise
        handle.patches.append(patch)
    return handle


class Applied:
    """Patches in force until `revert`, or until the end of a `with` block. Reverting twice is once."""

    def __init__(self) -> None:
        self.patches: list[Patch] = []
        """Those applied, in order."""
        self.skipped: dict[str, str] = {}
        """Name of each that does not apply -> why."""

    def revert(self) -> None:
        """Restore every target, the last patch first.

        Raises PatchError when somebody else has replaced a target since: putting the original back would undo their
        change too.
        """
        while self.patches:
            _release(self.patches[-1])
            self.patches.pop()

    def __enter__(self) -> Applied:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.revert()


@dataclass(kw_only=True)
class _Replaced:
    target: str
    owner: Any
    attribute: str
    original: Any
    replacement: Any


@dataclass(kw_only=True)
class _InForce:
    replaced: list[_Replaced]
    holders: int = 1


_in_force: dict[Patch, _InForce] = {}


def _hold(patch: Patch) -> None:
    if patch in _in_force:
        _in_force[patch].holders += 1
        return
    owner, attribute = _find(patch, patch.replacement)
    factory = getattr(owner, attribute)
    replaced: list[_Replaced] = []
    try:
        for target in patch.targets:
            owner, attribute = _find(patch, target)
            original = _stored(owner, attribute)
            replacement = factory(getattr(owner, attribute) if original is _MISSING else original)
            setattr(owner, attribute, replacement)
            replaced.append(
                _Replaced(target=target, owner=owner, attribute=attribute, original=original, replacement=replacement)
            )
    except BaseException:
        _restore(replaced)
        raise
    _in_force[patch] = _InForce(replaced=replaced)


def _release(patch: Patch) -> None:
    state = _in_force[patch]
    if state.holders > 1:
        state.holders -= 1
        return
    for change in state.replaced:
        current = _stored(change.owner, change.attribute)
        if current is not change.replacement:
            raise PatchError(
                f"patch {patch.name}: {change.target} was replaced again after the patch was applied, by {current!r}. "
                "Take that change back first"
            )
    for change in reversed(state.replaced):
        undo = getattr(change.replacement, UNDO, None)
        if undo is not None:
            undo()
    _restore(state.replaced)
    del _in_force[patch]


def _restore(replaced: list[_Replaced]) -> None:
    for change in reversed(replaced):
        if change.original is _MISSING:
            delattr(change.owner, change.attribute)
        else:
            setattr(change.owner, change.attribute, change.original)


def _stored(owner: Any, attribute: str) -> Any:
    """What stands there: of a class its own entry (a classmethod or property as such), or _MISSING when inherited."""
    return vars(owner).get(attribute, _MISSING) if isinstance(owner, type) else getattr(owner, attribute)


def _find(patch: Patch, dotted: str) -> tuple[Any, str]:
    """The object that holds the last attribute of `"package.module:a.b"`, and that attribute's name."""
    module, _, path = dotted.partition(":")
    *parents, attribute = path.split(".")
    try:
        owner: Any = importlib.import_module(module)
        for part in parents:
            owner = getattr(owner, part)
        getattr(owner, attribute)
    except (ImportError, AttributeError) as error:
        version = importlib.metadata.version(patch.distribution)
        raise PatchError(
            f"patch {patch.name}: {dotted} does not exist with {patch.distribution} {version} ({error}), although "
            f"the patch is declared for {patch.versions}. Install another version of {patch.distribution}, or of the "
            "plugin that declares the patch"
        ) from error
    return owner, attribute
