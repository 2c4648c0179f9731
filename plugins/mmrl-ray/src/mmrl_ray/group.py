"""All ranks of one start: their actors, what they write, how they end."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from mmrl_core.errors import PreflightError
from mmrl_ray.cluster import living
from mmrl_ray.interrupts import Interrupts
from mmrl_ray.outcome import Failure, of_actor, of_exit
from mmrl_ray.placement import Place, Placement
from mmrl_ray.rank_process import STDERR, Host, Order, RankProcess, Report

_POLL_S = 1.0
"""How long an actor waits for something to report."""
_WAIT_S = 0.25
"""How long the launcher waits for reports: it looks at signals in between."""
_START_LIMIT_S = 180.0
_FAILURE_GRACE_S = 3.0
"""How long the other ranks may take to fail by themselves, with an error worth reading, once one has failed."""
_SAVE_GRACE_S = 600.0
"""How long ranks may take to finish their step and save after they were told to stop."""
_UNREACHABLE_S = 60.0
"""How long a node may not answer before it counts as lost."""


@dataclass(kw_only=True)
class _Member:
    """A rank and its actor."""

    place: Place
    actor: Any
    pid: int = 0
    seen: int = 0
    running: bool = True
    unreachable_since: float | None = None


@dataclass(kw_only=True)
class RankGroup:
    """Starts the ranks of a placement, and watches them until the last one has ended."""

    placement: Placement
    bundle: Mapping[str, float]
    interrupts: Interrupts
    show: Callable[[int, bytes], None]
    """Called with (stream, bytes) of what rank 0 writes."""
    failures: list[Failure] = field(default_factory=list)
    stopped: list[int] = field(default_factory=list)
    """Ranks that we killed."""
    killed: bool = False
    """The user insisted, or ranks did not end in time."""
    _members: list[_Member] = field(default_factory=list)
    _handled: int = 0
    _stop_deadline: float | None = None
    _kill_at: float | None = None

    def create(self, resource: str) -> list[Host]:
        """One actor on each place; returns what it says of its node."""
        kind = ray.remote(RankProcess)
        for place in self.placement.places:
            strategy = PlacementGroupSchedulingStrategy(self.placement.group, placement_group_bundle_index=place.bundle)
            actor = kind.options(
                num_cpus=self.bundle.get("CPU", 0),
                num_gpus=self.bundle.get("GPU", 0),
                resources={k: v for k, v in self.bundle.items() if k not in ("CPU", "GPU")} or None,
                scheduling_strategy=strategy,
                max_restarts=0,
                max_task_retries=0,
            ).remote()
            self._members.append(_Member(place=place, actor=actor))
        return self._ask("host", resource)

    def reserve_port(self, address: str) -> int:
        """On rank 0's node."""
        port: int = self._get([self._members[0].actor.reserve_port.remote(address)])[0]
        return port

    def start(self, orders: Sequence[Order]) -> None:
        """Start every rank's process."""
        calls = [member.actor.start.remote(order) for member, order in zip(self._members, orders, strict=True)]
        for member, pid in zip(self._members, self._get(calls), strict=True):
            member.pid = pid

    def watch(self) -> None:
        """Until all ranks have ended, or have to be ended: then `failures` and `killed` say why."""
        pending = {self._poll(member): member for member in self._members}
        while pending:
            self._forward_signals()
            now = time.monotonic()
            if self._kill_at is not None and now >= self._kill_at:
                return
            if self._stop_deadline is not None and now >= self._stop_deadline:
                say(f"the ranks did not end within {_SAVE_GRACE_S:.0f} s of being told to stop; killing them")
                self.killed = True
                return
            ready, _ = ray.wait(list(pending), num_returns=len(pending), timeout=_WAIT_S)
            for call in ready:
                member = pending.pop(call)
                self._take(member, call)
                if member.running:
                    pending[self._poll(member)] = member

    def end(self) -> None:
        """Kill what still runs; nothing of this start is left on any living node."""
        stops = {member.actor.stop.remote(): member for member in self._members}
        ready, silent = ray.wait(list(stops), num_returns=len(stops), timeout=_UNREACHABLE_S) if stops else ([], [])
        for call in ready:
            member = stops[call]
            try:
                ray.get(call)
                if member.running and member.pid:
                    self.stopped.append(member.place.rank)
            except ray.exceptions.RayError as error:
                if member.running and member.pid:
                    if isinstance(error, ray.exceptions.ActorUnavailableError):
                        self._await_verdict(member.place)
                    self._fail(of_actor(member.place, error, time.time()))
            member.running = False
        for call in silent:
            place = stops[call].place
            unanswered = ray.exceptions.ActorUnavailableError(f"no answer for {_UNREACHABLE_S:.0f} s", None)
            self._fail(of_actor(place, unanswered, time.time()))
        for member in self._members:
            ray.kill(member.actor)
        self._members.clear()

    def _await_verdict(self, place: Place) -> None:
        """Ray takes a while to declare a node dead, and would place ranks there until then."""
        deadline = time.monotonic() + _UNREACHABLE_S
        while any(node.id == place.node.id for node in living()) and time.monotonic() < deadline:
            time.sleep(_WAIT_S)

    def _take(self, member: _Member, call: Any) -> None:
        try:
            report: Report = ray.get(call)
        except ray.exceptions.ActorUnavailableError as error:
            member.unreachable_since = member.unreachable_since or time.monotonic()
            if time.monotonic() - member.unreachable_since > _UNREACHABLE_S:
                member.running = False
                self._fail(of_actor(member.place, error, time.time()))
            else:
                time.sleep(_WAIT_S)
            return
        except ray.exceptions.RayError as error:
            member.running = False
            self._fail(of_actor(member.place, error, time.time()))
            return
        member.unreachable_since = None
        member.seen = report.last
        for stream, piece in report.output:
            self.show(stream, piece)
        if report.returncode is None:
            return
        member.running = False
        if report.returncode != 0:
            moment = time.time() - (report.failed_s or 0.0)
            self._fail(of_exit(member.place, member.pid, report.returncode, moment, out_of_memory=report.out_of_memory))

    def _fail(self, failure: Failure) -> None:
        self.failures.append(failure)
        if self._kill_at is None:
            self._kill_at = time.monotonic() + _FAILURE_GRACE_S

    def _forward_signals(self) -> None:
        while self._handled < len(self.interrupts.received):
            number = self.interrupts.received[self._handled]
            self._handled += 1
            if self.interrupts.received[: self._handled].count(signal.SIGINT) > 1:
                say("interrupted again; killing the ranks")
                self.killed = True
                self._kill_at = time.monotonic()
                return
            if self._stop_deadline is None:
                self._stop_deadline = time.monotonic() + _SAVE_GRACE_S
                say(f"{signal.Signals(number).name}: telling {len(self._members)} ranks to save and stop")
            for member in self._members:
                if member.running:
                    member.actor.signal.remote(number)

    def _poll(self, member: _Member) -> Any:
        return member.actor.poll.remote(member.seen, _POLL_S)

    def _ask(self, method: str, *arguments: Any) -> list[Any]:
        return self._get([getattr(member.actor, method).remote(*arguments) for member in self._members])

    def _get(self, calls: Sequence[Any]) -> list[Any]:
        """Answers of all. Raises ActorLostError for one that is gone; PreflightError when a node is too slow."""
        deadline = time.monotonic() + _START_LIMIT_S
        waiting = list(calls)
        while waiting and not self.interrupts.any():
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=_WAIT_S)
            if waiting and time.monotonic() > deadline:
                slow = {m.place.node.address for m, c in zip(self._members, calls, strict=False) if c in waiting}
                raise PreflightError(
                    f"launcher ray: nodes {', '.join(sorted(slow))} did not start a process within "
                    f"{_START_LIMIT_S:.0f} s"
                )
        if waiting:
            raise Interrupted
        answers = []
        for member, call in zip(self._members, calls, strict=False):
            try:
                answers.append(ray.get(call))
            except ray.exceptions.RayTaskError:
                raise  # a bug of ours, or an operating system's error on that node, with its traceback
            except ray.exceptions.RayError as error:
                member.running = False
                self.failures.append(of_actor(member.place, error, time.time()))
        if self.failures:
            raise RankLost
        return answers


class Interrupted(Exception):
    """A signal came before the ranks ran."""


class RankLost(Exception):
    """An actor was lost before the ranks ran."""


def say(text: str) -> None:
    """A line of the launcher's own."""
    print(f"mmrl: {text}", file=sys.stderr, flush=True)


def show_here(stream: int, piece: bytes) -> None:
    """To this process's own stdout or stderr."""
    target = sys.stderr if stream == STDERR else sys.stdout
    target.flush()
    try:
        descriptor = target.fileno()
    except io.UnsupportedOperation:  # a notebook's
        target.write(piece.decode(errors="replace"))
        return
    while piece:
        piece = piece[os.write(descriptor, piece) :]


def log_offsets(logs: Mapping[int, Path]) -> dict[int, tuple[Path, int]]:
    """Of each log, where this start will begin in it."""
    return {rank: (path, path.stat().st_size if path.exists() else 0) for rank, path in logs.items()}
