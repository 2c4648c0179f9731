"""The gate: whether a change makes a phase of a combination slower, or its peak of memory higher."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mmrl_core.perf.decide import (
    CERTAIN_TIME,
    MEMORY_LIMIT,
    TIME_LIMIT,
    Estimate,
    baseline_limit,
    is_short,
    memory_ratio,
)
from mmrl_core.perf.jobs import PHASES
from mmrl_core.perf.matrix import Matrix
from mmrl_core.perf.measure import Effort, measure
from mmrl_core.perf.results import Measured, NotMeasured, Result
from mmrl_core.perf.session import CannotRunError, Session
from mmrl_core.perf.side_by_side import Finding, FindingState, Turns, compare_trees
from mmrl_core.perf.tables import columns, milliseconds
from mmrl_core.perf.trees import Tree

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the gate found."""

    against: str
    """What the tree was compared with."""
    findings: list[Finding]
    skipped: list[NotMeasured]

    @property
    def fired(self) -> list[Finding]:
        """What stops the change."""
        return [f for f in self.findings if f.state == "fired"]


def gate_side_by_side(matrix: Matrix, base: Tree, head: Tree, turns: Turns, say: Say) -> Verdict:
    """Compare two trees on every combination of the matrix that the base can run.

    Raises PerfError when the head cannot run what the base can.
    """
    findings: list[Finding] = []
    skipped = [NotMeasured(name=u.name, reason=u.reason) for u in matrix.unavailable]
    with tempfile.TemporaryDirectory(prefix="mmrl-perf-") as scratch:
        matrix.make_models(Path(scratch))
        for number, combination in enumerate(matrix.combinations):
            say(f"[{number + 1}/{len(matrix.combinations)}] {combination.name}: {base.name} and {head.name} in turns")
            try:
                findings += compare_trees(matrix, combination, base, head, turns, Path(scratch) / str(number), say)
            except CannotRunError as error:
                skipped.append(NotMeasured(name=combination.name, reason=str(error)))
    return Verdict(against=base.name, findings=findings, skipped=skipped)


def gate_baselines(matrix: Matrix, head: Tree, effort: Effort, baselines: Sequence[Result], say: Say) -> Verdict:
    """Measure the matrix and compare it with the newest baseline of the same work on this machine.

    What looks slower or larger is measured once more before it counts.
    """
    result = measure(matrix, head, effort, say)
    findings, skipped = _against(result, baselines)
    suspect = {f.combination for f in findings if f.state == "fired"}
    if suspect:
        say(f"once more, to be sure: {', '.join(sorted(suspect))}")
        again = measure(matrix.part(suspect), head, effort, say)
        confirmed = {(f.combination, f.kind, f.phase) for f in _against(again, baselines)[0] if f.state == "fired"}
        findings = [
            replace(f, state="fine") if f.state == "fired" and (f.combination, f.kind, f.phase) not in confirmed else f
            for f in findings
        ]
    commits = sorted({b.commit for b in baselines if b.fingerprint.get("id") == result.fingerprint.get("id")})
    return Verdict(against=f"baselines of {', '.join(commits)}", findings=findings, skipped=skipped)


def load_baselines(folder: Path) -> list[Result]:
    """Every result in a folder; none when there is no folder. Raises PerfError for a file that is no result."""
    return [Result.load(path) for path in sorted(folder.glob("*.json"))]


def this_machine(matrix: Matrix, tree: Tree) -> str | None:
    """The fingerprint's id, as a process of the first combination that runs finds it; None when none does."""
    with tempfile.TemporaryDirectory(prefix="mmrl-perf-") as scratch:
        matrix.make_models(Path(scratch))
        for number, combination in enumerate(matrix.combinations):
            recipe, _ = matrix.recipe(combination, Path(scratch) / str(number), Path(scratch))
            try:
                with Session(tree, recipe, matrix.overrides) as session:
                    return str(session.ready()["fingerprint"]["id"])
            except CannotRunError:
                continue
    return None


def _against(result: Result, baselines: Sequence[Result]) -> tuple[list[Finding], list[NotMeasured]]:
    same_machine = [b for b in baselines if b.fingerprint.get("id") == result.fingerprint.get("id")]
    findings: list[Finding] = []
    skipped = list(result.unavailable)
    for measured in result.measured:
        known = [(b.created, m) for b in same_machine for m in b.measured if m.key() == measured.key()]
        if not known:
            skipped.append(NotMeasured(name=measured.name, reason="there is no baseline of this work on this machine"))
            continue
        findings += _findings(max(known, key=lambda pair: pair[0])[1], measured)
    return findings, skipped


def _findings(base: Measured, head: Measured) -> Iterator[Finding]:
    for phase in PHASES:
        before, now = base.seconds(phase), head.seconds(phase)
        if before is not None and now is not None:
            yield _time(base, head, phase, before, now)
    for phase in PHASES:
        peaks, others = base.bytes(phase), head.bytes(phase)
        if peaks and others:
            ratio = memory_ratio(peaks, others)
            yield Finding(
                combination=head.name,
                kind="memory",
                phase=phase,
                base=max(peaks),
                head=max(others),
                estimate=Estimate(ratio=ratio, low=ratio, high=ratio),
                state="fired" if ratio > MEMORY_LIMIT else "fine",
            )


def _time(base: Measured, head: Measured, phase: str, before: float, now: float) -> Finding:
    """By the ratio of medians; its bounds are the ratio, off by the A/A band to either side."""
    ratio = now / before
    limit = baseline_limit(base.band(phase), head.band(phase))
    band = limit / TIME_LIMIT if limit is not None else math.inf
    state: FindingState = "fine"
    if is_short(before, base.seconds("all") or before):
        state = "short"
    elif limit is not None and ratio > limit:
        state = "fired"
    elif ratio > CERTAIN_TIME:
        state = "unclear"
    estimate = Estimate(ratio=ratio, low=ratio / band, high=ratio * band)
    return Finding(
        combination=head.name, kind="time", phase=phase, base=before, head=now, estimate=estimate, state=state
    )  # fmt: skip


def verdict_table(verdict: Verdict) -> str:
    """Every phase that was judged, what was skipped, and a last line that says it all."""
    rows = [["combination, phase", "", "base", "now", "ratio", "bounds", ""]]
    rows += [_row(finding) for finding in verdict.findings]
    lines = columns(rows)
    lines += [f"skipped: {s.name}: {s.reason}" for s in verdict.skipped]
    unclear = sum(f.state == "unclear" for f in verdict.findings)
    if unclear:
        lines.append(
            f"{unclear} phases are unclear: the machine is too noisy now to see {CERTAIN_TIME - 1:.0%}. Commits in "
            "turns (--base COMMIT) and more --pairs see more"
        )
    lines += [f"FIRED: {finding_sentence(f)}" for f in verdict.fired]
    if not verdict.fired:
        judged = sum(f.state == "fine" for f in verdict.findings)
        lines.append(f"silent: {judged} phases are not worse than in {verdict.against}")
    return "\n".join(lines)


def finding_sentence(finding: Finding) -> str:
    """For people who look at one line only."""
    what = "takes" if finding.kind == "time" else "needs at its peak"
    amount = "the time" if finding.kind == "time" else "the memory"
    return f"{finding.combination}: {finding.phase} {what} {finding.estimate.ratio:.2f} times {amount}"


def _row(finding: Finding) -> list[str]:
    if finding.kind == "time":
        unit, base, head = "ms", milliseconds(finding.base), milliseconds(finding.head)
    else:
        unit, base, head = "MB", f"{finding.base / 1e6:.1f}", f"{finding.head / 1e6:.1f}"
    estimate = finding.estimate
    bounds = f"{estimate.low:.3f} to {estimate.high:.3f}"
    state = {"fine": "", "short": "too short to judge"}.get(finding.state, finding.state)
    return [f"{finding.combination}, {finding.phase}", unit, base, head, f"{estimate.ratio:.3f}", bounds, state]
