"""Errors raised for what the user, a plugin or the machine did. Our own invariants use `assert`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MmrlError(Exception):
    """Base of every error whose message is meant for the user: who, what, why, what to do."""

    exit_code = 1


class RecipeError(MmrlError):
    """The recipe is wrong. The message names file, line, field, value and what is allowed."""

    exit_code = 2


class PluginError(MmrlError):
    """A plugin is missing, broken, ambiguous or incompatible."""


class PatchError(MmrlError):
    """A change to another library's code does not fit what is installed, or cannot be taken back."""


class ModelError(MmrlError):
    """A model or tokenizer cannot be found, loaded or used for the named policy."""


class DataError(MmrlError):
    """A prompt source is missing, empty or has an unusable row."""


class RewardError(MmrlError):
    """A reward failed and the recipe's policy is to stop, or a reward broke its contract."""


class RolloutError(MmrlError):
    """A rollout engine cannot do what the recipe asks, or a folder holds other rollouts than those asked for."""


class BackendError(MmrlError):
    """A training backend cannot do what the recipe asks, or training became impossible."""


class CheckpointError(MmrlError):
    """A checkpoint cannot be written, is corrupt, or belongs to another run."""


class DeviceError(MmrlError):
    """A device is missing or lacks an operation."""


class PreflightError(MmrlError):
    """Ranks disagree, or the launch environment is unusable, before the first step."""


class ObserverError(MmrlError):
    """A metric writer that the recipe names failed while observing the run."""


class VerifyError(MmrlError):
    """Two combinations cannot be compared. Exit status 1 of `mmrl verify` means that they differ."""

    exit_code = 2


class PerfError(MmrlError):
    """Something cannot be measured, or measurements cannot be compared. Exit status 1 of `mmrl perf gate` means that
    it fired."""

    exit_code = 2


class MediaError(MmrlError):
    """An image or a video cannot be read, written or shown, or the package that this needs is missing."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the known word closest to `word`, or `""` when none is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
