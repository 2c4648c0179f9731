"""How ranks ended, and what is said of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray

from mmrl_ray.cluster import nodes
from mmrl_ray.placement import Place

_TAIL_LINES = 30
_NOTICED_S = 1.0
"""A crash is noticed after it: on a busy machine the other ranks may have failed for want of this one before that."""
_MEMORY = (
    "Use fewer or smaller micro-batches (backend), fewer ranks a node (launcher.strategy: SPREAD), or a node with more "
    "memory"
)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A rank that did not end well, not by our hand."""

    place: Place
    how: str
    """As in `rank 1 of 2 ... {how}`."""
    status: int
    """For the launcher's exit."""
    lost: bool
    """Killed, or gone with its actor or node: another start may do better. An error would only come again."""
    moment: float
    """By this machine's clock."""
    vanished: bool = False
    """Not by its own doing, and not for want of the others: nothing but the cause ends a rank like this."""
    hint: str | None = None


def of_exit(place: Place, pid: int, code: int, moment: float, *, out_of_memory: bool) -> Failure:
    """A process that ended with `code`, as of subprocess."""
    where = f"(pid {pid} on node {place.node.address})"
    if code >= 0:
        return Failure(place=place, how=f"{where} exited with status {code}", status=code, lost=False, moment=moment)
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "a real-time signal"
    hint = None
    if code == -signal.SIGKILL:
        hint = (
            f"The kernel has killed for want of memory on that node meanwhile. {_MEMORY}"
            if out_of_memory
            else "When you did not kill it, the kernel may have for want of memory: see `dmesg` there"
        )
    how = f"{where} was killed by signal {-code} ({name})"
    return Failure(
        place=place,
        how=how,
        status=128 - code,
        lost=True,
        moment=moment - _NOTICED_S,
        vanished=code == -signal.SIGKILL,
        hint=hint,
    )


def of_actor(place: Place, error: ray.exceptions.RayError, moment: float) -> Failure:
    """An actor that Ray says is gone; its rank has died with it."""
    text = str(error)
    status = 128 + int(signal.SIGKILL)
    where = f"on node {place.node.address}"
    hint = None
    if isinstance(error, ray.exceptions.ActorUnavailableError) and not _dead(place):
        how = f"{where} does not answer any more"
    elif isinstance(error, ray.exceptions.OutOfMemoryError) or "running low on memory" in text or "due to OOM" in text:
        how = f"{where} was killed by Ray for want of memory: the node was running low"
        hint = f"{_MEMORY}. Ray's limit is RAY_memory_usage_threshold of the node (0.95), at `ray start`"
    elif _dead(place):
        how = f"was lost with its node {place.node.address}"
    else:
        how = f"{where} was lost with its actor: {_gist(text)}"
    return Failure(place=place, how=how, status=status, lost=True, moment=moment, vanished=True, hint=hint)


def _dead(place: Place) -> bool:
    return any(node.id == place.node.id and not node.alive for node in nodes())


def first(failures: Sequence[Failure]) -> Failure:
    """The cause: what vanished, else the earliest."""
    vanished = [failure for failure in failures if failure.vanished]
    return min(vanished or failures, key=lambda failure: (failure.moment, failure.place.rank))


def explain(
    failures: Sequence[Failure], stopped: Sequence[int], size: int, logs: Mapping[int, tuple[Path, int]]
) -> str:
    """What to say of a run that failed.

    Args:
        stopped: ranks that the launcher killed.
        logs: of ranks that write to a file: it, and where this start began in it.
    """
    cause = first(failures)
    rank = cause.place.rank
    lines = [f"mmrl: rank {rank} of {size} {cause.how}"]
    if cause.hint is not None:
        lines.append(f"  {cause.hint}")
    lines += [f"  rank {f.place.rank} then {f.how}" for f in failures if f is not cause]
    if stopped:
        lines.append(f"  the other ranks were killed: {', '.join(map(str, sorted(stopped)))}")
    if rank not in logs:
        lines.append(f"  rank {rank} wrote to this terminal: see above")
        return "\n".join(lines)
    path, offset = logs[rank]
    tail = _tail(path, offset)
    lines.append(f"  the end of {path}:" if tail else f"  {path} is empty")
    return "\n".join([*lines, *(f"  | {line}" for line in tail)])


def _gist(text: str) -> str:
    """The sentence of Ray's long messages that says what happened."""
    for line in text.splitlines():
        if "Worker exit detail:" in line:
            return line.partition("Worker exit detail:")[2].partition(" Some common causes")[0].strip()
    return next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")


def _tail(path: Path, offset: int) -> list[str]:
    if not path.exists():
        return []
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(offset, size - 16_384))
        return file.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]
