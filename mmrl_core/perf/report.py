"""Results as one HTML page: nothing is loaded from elsewhere, so it opens from the disk and travels by mail."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from mmrl_core.errors import PerfError
from mmrl_core.perf.charts import COLOURS, Slice, history_chart, stacked_bars
from mmrl_core.perf.jobs import PHASES
from mmrl_core.perf.results import Measured, Result
from mmrl_core.perf.tables import milliseconds, peak, throughput, utilisation

PARTS = PHASES[:-1]
REST = "rest"
MEANINGS = {
    "rollout": "generating the samples",
    "old_log_p": "the separate pass for old log-probs",
    "reference_model": "the frozen reference's pass",
    "update": "forward, backward, optimizer",
    "resharding_to_infer": "new weights to the rollout engine",
    REST: "everything else in the step",
}


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A comparison with another program, as the scripts in perf/peers write it."""

    file: str
    names: str
    """`ours/trl`."""
    ratio: Mapping[str, float]
    """median, lower_quartile, upper_quartile, count."""
    commit: str
    fingerprint: Mapping[str, Any]
    job: Mapping[str, Any]

    @classmethod
    def load(cls, path: Path) -> Peer:
        """Raises PerfError when the file is none."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            names = next(name for name in values["summary"] if "/" in name)
            ratio = {
                k: float(values["summary"][names][k]) for k in ("median", "lower_quartile", "upper_quartile", "count")
            }
            return cls(
                file=path.name,
                names=names,
                ratio=ratio,
                commit=str(values["commit"]),
                fingerprint=dict(values["fingerprint"]),
                job=dict(values["job"]),
            )
        except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
            raise PerfError(f"{path}: is no comparison of perf/peers: {type(error).__name__}: {error}") from error


def report_page(results: Sequence[Result], peers: Sequence[Peer] = ()) -> str:
    """The page. The newest result is shown in full; the others of its machine are its history.

    Raises PerfError without a result.
    """
    if not results:
        raise PerfError("there is nothing to report: name files of mmrl perf run")
    ordered = sorted(results, key=lambda r: r.created)
    newest = ordered[-1]
    same = [r for r in ordered if r.fingerprint.get("id") == newest.fingerprint.get("id")]
    parts = [_heading(newest), _matrix(newest), _breakdown(newest), _memory(newest), _history(newest, same)]
    others = len(ordered) - len(same)
    if others:
        parts.append(f"<p class='note'>{others} results of other machines are left out: times do not compare.</p>")
    if peers:
        parts.append(_peers(peers))
    body = "\n".join(parts)
    return _PAGE.replace("{{style}}", _STYLE).replace("{{body}}", body)


def _heading(result: Result) -> str:
    facts = result.fingerprint
    machine = ", ".join(str(facts[k]) for k in ("chip", "cpu", "system") if k in facts)
    rows = [
        ("machine", f"{machine}; {facts.get('cores', '?')} cores, {facts.get('threads', '?')} threads a rank"),
        ("fingerprint", str(facts.get("id", "none"))),
        ("commit", result.commit),
        ("measured", result.created),
        ("size", result.size),
        ("load average", " to ".join("unknown" if v is None else f"{v:g}" for v in result.load_average)),
    ]
    cells = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in rows)
    return f"<h1>mmrl performance</h1>\n<dl>{cells}</dl>"


def _matrix(result: Result) -> str:
    head = ["combination", "model", *PHASES, "per second", "peak memory", "MFU"]
    rows = [
        [
            m.name,
            m.model,
            *(milliseconds(m.seconds(p)) for p in PHASES),
            throughput(m),
            peak(m.bytes("all")),
            utilisation(m),
        ]
        for m in result.measured
    ]
    text = "<h2>Combinations</h2>\n<p>Milliseconds of a step by phase, medians.</p>\n"
    text += _table(head, rows)
    if result.unavailable:
        text += "<h3>Not measured</h3>\n" + _table(["what", "why"], [[u.name, u.reason] for u in result.unavailable])
    return text


def _breakdown(result: Result) -> str:
    legend = "".join(
        f"<li><span class='swatch' style='background:{COLOURS[p]}'></span>{escape(p)}: {escape(MEANINGS[p])}</li>"
        for p in (*PARTS, REST)
    )
    text = "<h2>Where a step's time goes</h2>\n<ul class='legend'>" + legend + "</ul>\n"
    for modality in ("text", "image"):
        bars = [(m.name, _slices(m)) for m in result.measured if m.modality == modality]
        if bars:
            text += f"<figure>{stacked_bars(bars, f'{modality}: milliseconds of a step')}</figure>\n"
    return text


def _slices(measured: Measured) -> list[Slice]:
    """The phases in their order, then what is left of the step."""
    slices = [Slice(name=p, value=s * 1e3) for p in PARTS if (s := measured.seconds(p)) is not None]
    whole = (measured.seconds("all") or 0.0) * 1e3
    rest = whole - sum(s.value for s in slices)
    return [*slices, Slice(name=REST, value=rest)] if rest > 0 else slices


def _memory(result: Result) -> str:
    rows = [
        [m.name, str(rank), *(f"{m.bytes(p)[rank] / 1e6:.1f}" if m.bytes(p) else "unknown" for p in PHASES)]
        for m in result.measured
        for rank in range(m.ranks)
    ]
    what = "anonymous memory in use" if result.fingerprint.get("device") == "cpu" else "the device's own counter"
    return f"<h2>Peak memory</h2>\n<p>MB by phase and rank: {what}.</p>\n" + _table(
        ["combination", "rank", *PHASES], rows
    )


def _history(newest: Result, results: Sequence[Result]) -> str:
    if len(results) < 2:
        return "<h2>History</h2>\n<p class='note'>One result of this machine: name several files to see a history.</p>"
    text = "<h2>History</h2>\n<p>Milliseconds of a whole step, one point a result; only results of the same work, "
    text += "libraries and machine. The band is how far processes of one result differed.</p>\n"
    for measured in newest.measured:
        points = []
        for result in results:
            past = result.find(measured.name)
            if past is None or past.key() != measured.key():
                continue
            medians = past.round_medians("all")
            if medians:
                label = f"{result.commit}, {result.created}"
                points.append((label, min(medians) * 1e3, (past.seconds("all") or 0.0) * 1e3, max(medians) * 1e3))
        if len(points) > 1:
            text += f"<figure>{history_chart(measured.name, points)}</figure>\n"
    return text


def _peers(peers: Sequence[Peer]) -> str:
    head = ["comparison", "median ratio of seconds", "middle half", "pairs", "work", "commit", "machine"]
    rows = [
        [
            p.names,
            f"{p.ratio['median']:.2f}",
            f"{p.ratio['lower_quartile']:.2f} to {p.ratio['upper_quartile']:.2f}",
            f"{p.ratio['count']:.0f}",
            ", ".join(f"{k} {v}" for k, v in p.job.items() if isinstance(v, int | float | str) and "/" not in str(v)),
            p.commit,
            str(p.fingerprint.get("id", "unknown")),
        ]
        for p in peers
    ]
    return "<h2>Against other programs</h2>\n<p>Below 1 the first is faster.</p>\n" + _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    header = "".join(f"<th scope='col'>{escape(cell)}</th>" for cell in head)
    lines = [
        f"<tr><th scope='row'>{escape(row[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])}</tr>"
        for row in rows
    ]
    body = "\n".join(lines)
    return f"<div class='wide'><table><thead><tr>{header}</tr></thead>\n<tbody>{body}</tbody></table></div>\n"


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>mmrl performance</title>
<style>{{style}}</style>
</head>
<body>
{{body}}
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --soft: #5b5b66; --line: #d5d5de; --page: #ffffff; --band: #f4f4f8 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececf1; --soft: #a5a5b2; --line: #3d3d48; --page: #17171b; --band: #202026 } }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem; font: 15px/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--page) }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem } h3 { font-size: 1rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem } dt { color: var(--soft) } dd { margin: 0 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top }
th { text-align: left; font-weight: 600 } thead th { color: var(--soft); white-space: nowrap }
thead th + th { text-align: right }
tbody tr:nth-child(even) { background: var(--band) }
figure { margin: 1rem 0; overflow-x: auto } svg { max-width: 100%; height: auto } svg text { fill: var(--ink) }
.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem }
.swatch { display: inline-block; width: .8rem; height: .8rem; margin-right: .4rem; border-radius: 2px }
.note { color: var(--soft) }
"""
