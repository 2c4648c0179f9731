"""Joins this rank to the others."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from mmrl_core.contracts import DeviceOps
from mmrl_core.errors import PreflightError
from mmrl_core.launch.failure import mark_failure
from mmrl_core.launch.torchrun import check_environment
from mmrl_core.world import World

log = logging.getLogger("mmrl.launch")

STORE_VARIABLE = "MMRL_STORE"
TIMEOUT_VARIABLE = "MMRL_COLLECTIVE_TIMEOUT_S"
DEFAULT_TIMEOUT_S = 1800.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def connect(device: DeviceOps) -> World:
    """Make this rank's device current, initialise the process group and say who is there.

    Ranks meet through the file MMRL_STORE (local launcher) or the variables of torchrun; with neither this is a world
    of one, with a process group all the same, so that sharding and checkpoints work alike. Raises PreflightError when
    there are more local ranks than devices, the master address is a loopback one for several hosts, or the ranks
    cannot meet; DeviceError when the device is missing.
    """
    if dist.is_initialized():
        raise PreflightError("this process has joined a process group already; call disconnect() first")
    timeout = timedelta(seconds=collective_timeout_s())
    store_file = os.environ.get(STORE_VARIABLE)
    alone = store_file is None and "RANK" not in os.environ
    if store_file is None and not alone:
        check_environment()
    rank, size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    local_rank, local_size = _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1 if alone else size)
    check_local_ranks(device, local_size)
    if store_file is None and not alone:
        check_master_address(os.environ["MASTER_ADDR"], several_hosts=local_size < size)
    device.activate(local_rank)
    try:
        if store_file is not None:
            dist.init_process_group(
                device.process_group_backend,
                store=dist.FileStore(store_file, size),  # type: ignore[attr-defined]
                rank=rank,
                world_size=size,
                timeout=timeout,
            )
        elif alone:
            dist.init_process_group(
                device.process_group_backend,
                store=dist.HashStore(),  # type: ignore[attr-defined]
                rank=0,
                world_size=1,
                timeout=timeout,
            )
        else:
            dist.init_process_group(device.process_group_backend, init_method="env://", timeout=timeout)
    except (RuntimeError, ValueError, OSError) as error:
        where = store_file or f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise PreflightError(
            f"rank {rank} of {size} on {socket.gethostname()} could not meet the others at {where} with "
            f"{device.process_group_backend}: {error}"
        ) from error
    world = World(rank=rank, size=size, local_rank=local_rank)
    return replace(world, nodes=len(set(world.gather(host_identity()))))


def disconnect() -> None:
    """Leave the process group, if this process is in one. In a `finally` block while an error passes through, the
    launcher learns first that this rank failed before others could notice its absence."""
    if sys.exc_info()[0] is not None:
        mark_failure()
    if dist.is_initialized():
        dist.destroy_process_group()


def collective_timeout_s() -> float:
    """Seconds a collective may take: MMRL_COLLECTIVE_TIMEOUT_S, or 1800."""
    text = os.environ.get(TIMEOUT_VARIABLE, "")
    if not text:
        return DEFAULT_TIMEOUT_S
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise PreflightError(f"{TIMEOUT_VARIABLE}={text!r}: give a positive number of seconds")
    return seconds


def host_identity() -> str:
    """The same for ranks of one host, different between hosts even when both are called localhost."""
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
    return f"{socket.gethostname()} {boot}"


def check_local_ranks(device: DeviceOps, local_ranks: int) -> None:
    """Raise PreflightError when this host has fewer devices than ranks. Ranks may share the cores of a CPU."""
    count = device.device_count()
    if local_ranks <= count:
        return
    if device.name == "cpu":
        log.warning("%d ranks share %d cores of %s: they will take turns", local_ranks, count, socket.gethostname())
        return
    raise PreflightError(
        f"{local_ranks} ranks on {socket.gethostname()}, but device {device.name} counts {count} there. Start at most "
        f"{count} ranks on this host, or make more devices visible"
    )


def check_master_address(address: str, *, several_hosts: bool) -> None:
    """Raise PreflightError when ranks on other hosts would look for rank 0 on themselves."""
    if several_hosts and is_loopback(address):
        raise PreflightError(
            f"MASTER_ADDR={address} is a loopback address, but the ranks sit on several hosts, which would each look "
            "for rank 0 on themselves. Set it to an address of rank 0's host that the others reach (torchrun: "
            "--master-addr or --rdzv-endpoint), and see that /etc/hosts does not map that name to 127.x"
        )


def is_loopback(address: str) -> bool:
    """Whether `address`, a name or a number, means this host only. A name that does not resolve here does not."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        pass
    try:
        found = {info[4][0] for info in socket.getaddrinfo(address, None)}
    except OSError:
        return False
    return bool(found) and all(ipaddress.ip_address(str(number).split("%")[0]).is_loopback for number in found)


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable)
    if not text:
        return default
    if not text.isdigit():
        raise PreflightError(f"{variable}={text!r} is not a number")
    return int(text)
