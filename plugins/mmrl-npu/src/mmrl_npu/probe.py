"""Whether an NPU can be used here, answered in milliseconds. Imports neither torch_npu nor a library of CANN."""

from __future__ import annotations

import sys

from mmrl_core.hookspecs import Probe
from mmrl_npu.machine import INSTALLATION, MANAGEMENT_NODES, Machine, here
from mmrl_npu.versions import cann_match, torch_match

VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"
PAGE = "docs/how-to/npu.md"


def npu() -> Probe:
    """The device's probe: torch_npu is asked where it is imported already; elsewhere files and variables."""
    torch = sys.modules.get("torch")
    if torch is not None and "torch_npu" in sys.modules:
        count = torch.npu.device_count() if torch.npu.is_available() else 0
        if count:
            return Probe(available=True, reason=f"{count} NPU(s)")
        return Probe(available=False, reason="torch.npu.is_available() is false", cure="see what `npu-smi info` says")
    return examine(here())


def examine(machine: Machine) -> Probe:
    """What is missing first, in the order in which one would install it, and its cure."""
    if machine.sign_of_ascend() is None:
        return Probe(
            available=False,
            reason="nothing of Ascend is here: no NPU, no driver, no CANN",
            cure=f"on an Ascend machine: its driver, CANN and pip install 'mmrl-npu[ascend]', as {PAGE} says",
        )
    if not machine.npus():
        return Probe(available=False, reason="no NPU device node (/dev/davinci0)", cure=pass_devices())
    lacking = [node for node in MANAGEMENT_NODES if not machine.path(node).exists()]
    if lacking:
        return Probe(available=False, reason=f"no device node {lacking[0]}", cure=pass_devices())
    visible = machine.environment.get(VISIBLE)
    if visible is not None and not visible.strip():
        return Probe(available=False, reason=f"{VISIBLE}={visible!r} hides every NPU", cure=f"unset {VISIBLE}")
    home = machine.toolkit()
    if home is None:
        script = machine.toolkit_script()
        cure = f"source {script}" if script else f"install the CANN toolkit below {INSTALLATION}; {PAGE} says how"
        reason = "CANN's environment is not set (no ASCEND_HOME_PATH)" if script else "CANN is not installed"
        return Probe(available=False, reason=reason, cure=cure)
    if not home.is_dir():
        script = machine.toolkit_script()
        cure = f"source {script or 'set_env.sh of the CANN toolkit'}"
        return Probe(available=False, reason=f"ASCEND_HOME_PATH names {home}, which does not exist", cure=cure)
    match = torch_match(machine)
    if not match.fits:
        return Probe(available=False, reason=match.found, cure=match.cure)
    software = f"{match.found}, {cann_match(machine).found}"  # another CANN may do: `mmrl doctor` has a row for it
    return Probe(available=True, reason=f"{len(machine.npus())} NPU(s), {software}")


def pass_devices() -> str:
    """The cure of missing device nodes."""
    given = " ".join(f"--device={node}" for node in ("/dev/davinci0", *MANAGEMENT_NODES))
    return f"install the NPU driver; in a container, pass the devices: docker run {given} ({PAGE})"
