"""What `mmrl doctor` looks at on an Ascend machine, each with the command that cures it. Imports no torch and no CANN.

Each function is a probe; its argument is for tests.
"""

from __future__ import annotations

import os
import re

from mmrl_core import Diagnosis, Probe
from mmrl_npu import jemalloc, probe
from mmrl_npu.machine import INSTALLATION, MANAGEMENT_NODES, Machine, here
from mmrl_npu.versions import cann_match, torch_match

TOPICS = {
    "cann": "cann",
    "nnal": "nnal",
    "ascend-driver": "driver",
    "npus": "npus",
    "torch-npu": "torch_npu",
    "hccl": "hccl",
    "hccl-variables": "hccl_variables",
    "npu-allocator": "allocator",
    "jemalloc": "jemalloc_preloaded",
    "ip-command": "ip_command",
    "apex": "apex",
}
"""Rows of `mmrl doctor`, and the functions that fill them."""
_SECONDS = {"HCCL_CONNECT_TIMEOUT": (120, 7200), "HCCL_EXEC_TIMEOUT": (0, 2147483647)}
"""Ranges that CANN documents."""
_REDUCTIONS = ("false", "true", "strict")


def declared(machine: Machine | None = None) -> list[Diagnosis]:
    """Every row on a machine with anything of Ascend; none elsewhere, where the device's own row says it all."""
    if (machine or here()).sign_of_ascend() is None:
        return []
    return [Diagnosis(name=topic, probe=f"mmrl_npu.diagnoses:{function}") for topic, function in TOPICS.items()]


def cann(machine: Machine | None = None) -> Probe:
    """Is CANN's environment set, and which CANN is it?"""
    machine = machine or here()
    home, script = machine.toolkit(), machine.toolkit_script()
    if home is None:
        if script is None:
            cure = f"install the CANN toolkit below {INSTALLATION}, or start a CANN container: {probe.PAGE}"
            return Probe(available=False, reason="the CANN toolkit is not installed", cure=cure)
        return Probe(available=False, reason="CANN's environment is not set", cure=f"source {script}")
    if not home.is_dir():
        cure = f"source {script or 'set_env.sh of the CANN toolkit'}"
        return Probe(available=False, reason=f"ASCEND_HOME_PATH names {home}, which does not exist", cure=cure)
    return Probe(available=True, reason=f"CANN {machine.toolkit_version() or 'of unknown version'} in {home}")


def nnal(machine: Machine | None = None) -> Probe:
    """NNAL (ATB): vllm-ascend needs it; training does not."""
    machine = machine or here()
    version, script = machine.nnal_version(), f"{INSTALLATION}/nnal/atb/set_env.sh"
    if version is None:
        cure = "install Ascend-cann-nnal of CANN's version, then source " + script
        return Probe(
            available=False, reason="NNAL is not installed; vllm-ascend needs it, training does not", cure=cure
        )
    if not machine.environment.get("ATB_HOME_PATH"):
        reason = f"NNAL {version} is installed, but its environment is not set"
        return Probe(available=False, reason=reason, cure=f"source {script}")
    toolkit = machine.toolkit_version()
    if toolkit is not None and toolkit != version:
        reason = f"NNAL {version} beside CANN {toolkit}: they are released together"
        return Probe(available=False, reason=reason, cure=f"install Ascend-cann-nnal {toolkit}")
    return Probe(available=True, reason=f"NNAL {version}")


def driver(machine: Machine | None = None) -> Probe:
    """The driver is the host's; a container sees the files that were passed to it."""
    machine = machine or here()
    version, folder = machine.driver_version(), f"{INSTALLATION}/driver"
    if version is None:
        cure = f"install the NPU driver on the host; in a container: docker run -v {folder}:{folder}"
        return Probe(available=False, reason=f"no driver files ({folder}/version.info)", cure=cure)
    if machine.command("npu-smi") is None:
        files = ("/usr/local/bin/npu-smi", "/usr/local/dcmi")
        cure = "in a container: docker run " + " ".join(f"-v {file}:{file}" for file in files)
        return Probe(available=False, reason=f"driver {version}, but no npu-smi", cure=cure)
    return Probe(available=True, reason=f"driver {version}")


def npus(machine: Machine | None = None) -> Probe:
    """Device nodes, permissions and ASCEND_RT_VISIBLE_DEVICES."""
    machine = machine or here()
    numbers = machine.npus()
    if not numbers:
        return Probe(available=False, reason="no NPU device node (/dev/davinci0)", cure=probe.pass_devices())
    for node in (*(f"/dev/davinci{number}" for number in numbers), *MANAGEMENT_NODES):
        if not machine.path(node).exists():
            return Probe(available=False, reason=f"no device node {node}", cure=probe.pass_devices())
        if not os.access(machine.path(node), os.R_OK | os.W_OK):
            cure = "sudo usermod -a -G HwHiAiUser $USER, then log in again"
            return Probe(available=False, reason=f"{node} may not be opened by this user", cure=cure)
    visible = machine.environment.get(probe.VISIBLE)
    if visible is None:
        return Probe(available=True, reason=f"{len(numbers)} NPU(s)")
    words = [word.strip() for word in visible.split(",")]
    wrong = [word for word in words if not word.isdigit()]
    if wrong:
        reason = f"{probe.VISIBLE}={visible!r}: {wrong[0]!r} is not a number"
        return Probe(available=False, reason=reason, cure=f"export {probe.VISIBLE}={','.join(map(str, numbers))}")
    return Probe(available=True, reason=f"{len(words)} of {len(numbers)} NPU(s) visible ({probe.VISIBLE}={visible})")


def torch_npu(machine: Machine | None = None) -> Probe:
    """torch, torch_npu and CANN belong together; beside no CANN, torch_npu keeps torch itself from being imported."""
    machine = machine or here()
    if machine.version_of("torch-npu") is not None and machine.toolkit() is None:
        reason = "torch_npu is installed and CANN's environment is not set: `import torch` fails"
        script = machine.toolkit_script()
        cure = f"source {script}" if script else "export TORCH_DEVICE_BACKEND_AUTOLOAD=0, or pip uninstall torch-npu"
        return Probe(available=False, reason=reason, cure=cure)
    matches = (torch_match(machine), cann_match(machine))
    bad = next((match for match in matches if not match.fits), None)
    if bad is not None:
        return Probe(available=False, reason=bad.found, cure=bad.cure)
    return Probe(available=True, reason=", ".join(match.found for match in matches))


def hccl(machine: Machine | None = None) -> Probe:
    """libhccl.so, where the loader finds it."""
    machine = machine or here()
    home = machine.toolkit()
    if home is None:
        return Probe(
            available=False, reason="libhccl.so belongs to CANN, whose environment is not set", cure=_source(machine)
        )
    searched = filter(None, machine.environment.get("LD_LIBRARY_PATH", "").split(":"))
    if any((machine.path(folder) / "libhccl.so").exists() for folder in searched):
        return Probe(available=True, reason="libhccl.so is on LD_LIBRARY_PATH")
    there = (home / "lib64" / "libhccl.so").exists()
    reason = "libhccl.so is not on LD_LIBRARY_PATH" if there else f"no libhccl.so in {home / 'lib64'}"
    return Probe(available=False, reason=reason, cure=_source(machine) if there else "install the CANN toolkit again")


def hccl_variables(machine: Machine | None = None) -> Probe:
    """Variables of the collectives that are set, with values that HCCL would refuse or that cannot be meant."""
    machine = machine or here()
    given = {name: value for name, value in machine.environment.items() if name.startswith("HCCL_")}
    for name, (low, high) in _SECONDS.items():
        value = given.get(name)
        if value is not None and not (value.isdigit() and low <= int(value) <= high):
            reason = f"{name}={value!r} is not a whole number of seconds from {low} to {high}"
            return Probe(available=False, reason=reason, cure=f"export {name}=1200")
    value = given.get("HCCL_DETERMINISTIC")
    if value is not None and value.lower() not in _REDUCTIONS:
        reason = f"HCCL_DETERMINISTIC={value!r} is none of {', '.join(_REDUCTIONS)}"
        return Probe(available=False, reason=reason, cure="export HCCL_DETERMINISTIC=true")
    address = given.get("HCCL_IF_IP", "")
    if address.startswith("127.") or address in ("localhost", "::1"):
        reason = f"HCCL_IF_IP={address} is a loopback address: other machines look for it on themselves"
        return Probe(
            available=False, reason=reason, cure="unset HCCL_IF_IP, or give this host's address on its network"
        )
    interface = given.get("HCCL_SOCKET_IFNAME", "")
    exact = re.fullmatch(r"=([\w.-]+)", interface)  # without "=", it is the beginning of a name
    known = sorted(path.name for path in machine.path("/sys/class/net").glob("*"))
    if exact and known and exact[1] not in known:
        reason = f"HCCL_SOCKET_IFNAME={interface} names no network interface of this host ({', '.join(known)})"
        return Probe(available=False, reason=reason, cure=f"export HCCL_SOCKET_IFNAME=={known[0]}")
    said = ", ".join(f"{name}={value}" for name, value in sorted(given.items()))
    return Probe(available=True, reason=said or "none is set; mmrl env npu RECIPE prints what to set")


def allocator(machine: Machine | None = None) -> Probe:
    """PYTORCH_NPU_ALLOC_CONF: what excludes each other."""
    machine = machine or here()
    name = "PYTORCH_NPU_ALLOC_CONF"
    value = machine.environment.get(name)
    if value is None:
        return Probe(available=True, reason=f"{name} is not set; mmrl env npu RECIPE prints what to set")
    options = dict(part.partition(":")[::2] for part in value.replace(" ", "").split(",") if part)
    growing = options.get("expandable_segments", "").lower() == "true"
    rivals = [other for other in ("max_split_size_mb", "garbage_collection_threshold") if other in options]
    if growing and rivals:
        reason = f"{name}={value}: expandable_segments excludes {' and '.join(rivals)}"
        return Probe(available=False, reason=reason, cure=f"export {name}=expandable_segments:True")
    return Probe(available=True, reason=f"{name}={value}")


def jemalloc_preloaded(machine: Machine | None = None) -> Probe:
    """Whether this process runs on jemalloc, as the workers of Ray should."""
    machine = machine or here()
    if "libjemalloc" in machine.loaded_libraries():
        return Probe(available=True, reason="jemalloc is preloaded")
    missing = [part for part in re.split(r"[:\s]+", machine.environment.get("LD_PRELOAD", "")) if "jemalloc" in part]
    found = jemalloc.find(machine)
    if missing:
        reason = f"LD_PRELOAD names {missing[0]}, but it was not loaded"
    else:
        reason = "jemalloc is not preloaded; without it the workers of Ray keep the memory that they have freed"
    if found is None:
        return Probe(available=False, reason=reason, cure=_install("libjemalloc2", "jemalloc", machine))
    cure = f'export LD_PRELOAD="${{LD_PRELOAD:+$LD_PRELOAD:}}{found}"'
    return Probe(available=False, reason=reason, cure=cure)


def ip_command(machine: Machine | None = None) -> Probe:
    """Launch scripts find the host's address with `ip`, which slim containers lack."""
    machine = machine or here()
    found = machine.command("ip")
    if found is not None:
        return Probe(available=True, reason="the command ip is installed")
    cure = _install("iproute2", "iproute", machine)
    return Probe(available=False, reason="no command ip, which launch scripts find the host's address with", cure=cure)


def apex(machine: Machine | None = None) -> Probe:
    """Guides say that apex must be built; it is not needed."""
    version = (machine or here()).version_of("apex")
    beside = f"apex {version} is installed; " if version is not None else ""
    needed = "not needed: the optimizer is torch's, and MindSpeed has its own for what Megatron takes from apex"
    return Probe(available=True, reason=beside + needed)


def _source(machine: Machine) -> str:
    return f"source {machine.toolkit_script() or 'set_env.sh of the CANN toolkit'}"


def _install(debian: str, other: str, machine: Machine) -> str:
    return f"yum install -y {other}" if machine.command("yum") else f"apt-get install -y {debian}"
