"""Which torch, torch_npu and CANN belong together. Imports none of them."""

from __future__ import annotations

from dataclasses import dataclass

from packaging.version import InvalidVersion, Version

from mmrl_npu.machine import Machine

# From the compatibility table in the package description of torch-npu 2.13.0 on PyPI and from COMPATIBILITY.md of
# https://gitcode.com/Ascend/pytorch (both read in 2026). A release that is in neither is unknown.
CANN_OF_TORCH_NPU = {
    "2.7.1": "8.3.RC1",
    "2.7.1.post2": "8.5.0",
    "2.7.1.post4": "9.0.0",
    "2.7.1.post8": "9.1.0",
    "2.8.0": "8.3.RC1",
    "2.8.0.post2": "8.5.0",
    "2.8.0.post4": "9.0.0",
    "2.9.0": "8.5.0",
    "2.9.0.post2": "9.0.0",
    "2.9.0.post6": "9.1.0",
    "2.10.0rc2": "8.5.0",
    "2.10.0.post4": "9.1.0",
    "2.11.0rc1": "8.5.0",
    "2.11.0": "9.1.0",
    "2.12.0rc1": "8.5.0",
    "2.12.0": "9.1.0",
}
"""torch_npu release -> the CANN release that it was published for."""


@dataclass(frozen=True, kw_only=True)
class Match:
    """Whether the installed versions belong together."""

    fits: bool
    found: str
    """The versions, and what is wrong with them."""
    cure: str = ""


def torch_match(machine: Machine) -> Match:
    """torch_npu X.Y.Z works with torch X.Y.Z and no other: it is compiled against it."""
    torch, ours = machine.version_of("torch"), machine.version_of("torch-npu")
    if ours is None:
        return Match(fits=False, found="torch_npu is not installed", cure="pip install 'mmrl-npu[ascend]'")
    wanted = Version(ours).base_version
    if torch is None or Version(torch).base_version != wanted:
        found = "torch is not installed" if torch is None else f"torch {torch} is installed"
        return Match(
            fits=False,
            found=f"torch_npu {ours} is made for torch {wanted}, and {found}",
            cure=f"pip install torch=={wanted} --index-url https://download.pytorch.org/whl/cpu",
        )
    return Match(fits=True, found=f"torch {torch}, torch_npu {ours}")


def cann_match(machine: Machine) -> Match:
    """Whether the sourced CANN is the one that torch_npu was published for, or newer; unknown counts as fitting."""
    ours, cann = machine.version_of("torch-npu"), machine.toolkit_version()
    if ours is None or cann is None:
        return Match(fits=True, found="CANN's version is not known" if cann is None else f"CANN {cann}")
    wanted = CANN_OF_TORCH_NPU.get(ours)
    if wanted is None:
        return Match(fits=True, found=f"CANN {cann}; which CANN torch_npu {ours} was published for is not known here")
    try:
        older = Version(cann) < Version(wanted)
    except InvalidVersion:  # names of previews such as 8.2.RC1.alpha003 are not version numbers
        older = False
    if "alpha" in cann or "beta" in cann:
        return Match(fits=True, found=f"CANN {cann}; torch_npu {ours} was published for CANN {wanted}")
    if not older:
        return Match(fits=True, found=f"CANN {cann}")
    fitting = [release for release, needed in CANN_OF_TORCH_NPU.items() if needed == cann]
    return Match(
        fits=False,
        found=f"CANN {cann} is older than CANN {wanted}, which torch_npu {ours} was published for",
        cure=f"install CANN {wanted}" + (f", or one of torch-npu {', '.join(fitting)}" if fitting else ""),
    )
