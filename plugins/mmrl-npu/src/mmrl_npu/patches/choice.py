"""Which patches a recipe asks for, and putting them in force. Imports no torch."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Mapping

from packaging.specifiers import SpecifierSet

from mmrl_core.patches import Applied, apply
from mmrl_npu.patches.declared import PATCHES, TORCH_NPU

log = logging.getLogger("mmrl.npu")

NAMES = tuple(patch.name for patch in PATCHES)
"""Every patch, in the order in which they are applied."""

DEFAULT = frozenset(
    {
        "transformers-rms-norm",
        "transformers-swiglu",
        "transformers-rotary",
        "diffusers-rms-norm",
        "diffusers-rotary-layout",
    }
)
"""Those that are on unless a recipe says otherwise: other frameworks use the same operators for the same layers."""


def chosen(switches: bool | Mapping[str, bool]) -> tuple[str, ...]:
    """Names of the patches that are on: true is the default set, false is none, a mapping changes the default set."""
    if switches is False:
        return ()
    given = {} if switches is True else switches
    return tuple(name for name in NAMES if given.get(name, name in DEFAULT))


def apply_chosen(switches: bool | Mapping[str, bool], *, device: str) -> Applied:
    """Apply the chosen patches that fit what is installed here; the handle takes them back.

    With a torch-npu whose operators nobody has compared with our calls, none is applied and a warning says so. Raises
    PatchError when a library of a fitting version lacks what is to be replaced.
    """
    names = chosen(switches)
    unknown = _unknown_torch_npu()
    if names and unknown is not None:
        log.warning("patches %s are left out: %s", ", ".join(names), unknown)
        names = ()
    handle = apply([patch for patch in PATCHES if patch.name in names], device=device)
    for name, reason in handle.skipped.items():
        log.info("patch %s is left out: %s", name, reason)
    if handle.patches:
        log.info("patches in force: %s", ", ".join(patch.name for patch in handle.patches))
    return handle


def _unknown_torch_npu() -> str | None:
    """Why the operators of the installed torch-npu are not known to take our calls; None when they are."""
    try:
        version = importlib.metadata.version("torch-npu")
    except importlib.metadata.PackageNotFoundError:
        return "torch-npu is not installed"
    if SpecifierSet(TORCH_NPU).contains(version, prereleases=True):
        return None
    return f"torch-npu {version} is not in {TORCH_NPU}, for which they were made"
