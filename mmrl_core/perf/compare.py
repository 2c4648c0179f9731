"""Two results next to each other, for people."""

from __future__ import annotations

from mmrl_core.errors import PerfError
from mmrl_core.perf.decide import memory_ratio
from mmrl_core.perf.jobs import PHASES
from mmrl_core.perf.results import Measured, Result
from mmrl_core.perf.tables import columns


def comparison_table(first: Result, second: Result, *, across: bool = False) -> str:
    """Ratios second / first by combination and phase, with the A/A band: how far processes of equal code differed, in
    the noisier of the two results.

    `across` different machines there are no ratios of seconds, for they would say nothing about the code: each phase's
    share of the step is compared, and peaks of memory.

    Raises PerfError for results of different machines (unless `across`), and when they share no combination.
    """
    if first.fingerprint.get("id") != second.fingerprint.get("id") and not across:
        raise PerfError(
            f"the two were measured on different machines, or with other numbers of threads:\n  {first.fingerprint}\n"
            f"  {second.fingerprint}\nTheir times do not compare. --across compares memory and shares of the step"
        )
    pairs = [(m, other) for m in first.measured if (other := second.find(m.name)) is not None]
    rows: list[list[str]] = []
    notes: list[str] = []
    for before, now in pairs:
        if (before.model, before.ranks, before.work) != (now.model, now.ranks, now.work):
            notes.append(f"not compared: {now.name}: other work ({before.work} and {now.work})")
            continue
        if before.versions != now.versions:
            notes.append(f"{now.name}: other versions: {before.versions} and {now.versions}")
        rows += _shares(before, now) if across else _times(before, now)
        rows += _memory(before, now)
    if not rows:
        raise PerfError("\n".join(["the two results have no combination of the same work in common", *notes]))
    kind = "share" if across else "seconds"
    header = ["combination, phase", "of", f"A {first.commit}", f"B {second.commit}", "B/A", "A/A band", ""]
    names = {m.name for m, _ in pairs}
    notes += [f"only in A: {m.name}" for m in first.measured if m.name not in names]
    notes += [f"only in B: {m.name}" for m in second.measured if m.name not in names]
    return "\n".join([*columns([header, *rows]), *notes, f"{kind}: medians over processes; memory: bytes at the peak"])


def _times(before: Measured, now: Measured) -> list[list[str]]:
    rows = []
    for phase in PHASES:
        a, b = before.seconds(phase), now.seconds(phase)
        if a is None or b is None:
            continue
        bands = [band for band in (before.band(phase), now.band(phase)) if band is not None]
        band = max(bands) if bands else None
        rows.append(
            [
                f"{now.name}, {phase}",
                "seconds",
                f"{a:.4g}",
                f"{b:.4g}",
                f"{b / a:.3f}",
                f"{1 / band:.3f} to {band:.3f}" if band is not None else "unknown",
                "" if band is None or 1 / band <= b / a <= band else ("slower" if b > a else "faster"),
            ]
        )
    return rows


def _shares(before: Measured, now: Measured) -> list[list[str]]:
    rows = []
    for phase in PHASES[:-1]:
        a, b = before.seconds(phase), now.seconds(phase)
        whole_a, whole_b = before.seconds("all"), now.seconds("all")
        if a is None or b is None or whole_a is None or whole_b is None:
            continue
        shares = (a / whole_a, b / whole_b)
        text = [f"{share:.1%}" for share in shares]
        rows.append([f"{now.name}, {phase}", "share", *text, f"{shares[1] / shares[0]:.3f}", "", ""])
    return rows


def _memory(before: Measured, now: Measured) -> list[list[str]]:
    rows = []
    for phase in PHASES:
        a, b = before.bytes(phase), now.bytes(phase)
        if not a or not b:
            continue
        text = [f"{max(peaks) / 1e6:.1f} MB" for peaks in (a, b)]
        rows.append([f"{now.name}, {phase}", "memory", *text, f"{memory_ratio(a, b):.3f}", "", ""])
    return rows
