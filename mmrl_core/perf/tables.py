"""Measurements as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from mmrl_core.perf.jobs import PHASES
from mmrl_core.perf.results import Measured, Result

UNKNOWN = "unknown"


def result_table(result: Result) -> str:
    """The matrix: milliseconds by phase, throughput, memory, MFU; then what was not measured, and why."""
    header = ["combination", *PHASES, "per second", "peak memory", "MFU"]
    lines = columns([header, *(_row(m) for m in result.measured)])
    facts = result.fingerprint
    if facts:
        load = f", load average {result.load_average[0]}" if result.load_average[0] is not None else ""
        lines.append(f"milliseconds, medians; {facts['cpu']}, {facts['threads']} threads a rank{load}")
    lines += [f"not measured: {u.name}: {u.reason}" for u in result.unavailable]
    return "\n".join(lines)


def _row(measured: Measured) -> list[str]:
    times = [milliseconds(measured.seconds(phase)) for phase in PHASES]
    return [measured.name, *times, throughput(measured), peak(measured.bytes("all")), utilisation(measured)]


def milliseconds(seconds: float | None) -> str:
    """Three digits; a dash for a phase that does not happen."""
    if seconds is None:
        return "-"
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def throughput(measured: Measured) -> str:
    """Tokens of the whole step by the published definition, or samples."""
    tokens, samples = measured.rate("e2e_tps"), measured.rate("perf/samples_per_second")
    if tokens is not None:
        return f"{tokens:,.0f} tokens"
    return f"{samples:.4g} samples" if samples is not None else UNKNOWN


def peak(ranks: Sequence[int]) -> str:
    """Of the rank that needs most."""
    return f"{max(ranks) / 1e6:.0f} MB" if ranks else UNKNOWN


def utilisation(measured: Measured) -> str:
    """Of the update."""
    value = measured.utilisation()
    return f"{value:.1%}" if value is not None else UNKNOWN


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    ]
