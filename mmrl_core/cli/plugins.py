"""`mmrl plugins`: every installed component, and whether it can run here."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from mmrl_core.plugins import KINDS, Plugin, Plugins, load_plugins


@dataclass(frozen=True, kw_only=True)
class Row:
    """One component, or one plugin that has none because it is broken or blocked."""

    distribution: str
    version: str
    plugin: str
    kind: str | None
    name: str | None
    status: str
    """`available`, `unavailable`, `broken` or `blocked`."""
    reason: str
    """Why it is not available, or a detail."""
    cure: str
    summary: str


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser("plugins", help="list installed components", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the table. Exit status 0 even when plugins are broken: `mmrl doctor` judges."""
    found = rows(load_plugins())
    if arguments.json:
        print(json.dumps([asdict(row) for row in found], indent=2))
        return 0
    table = [("DISTRIBUTION", "VERSION", "KIND", "NAME", "STATUS", "")]
    table += [
        (row.distribution, row.version, row.kind or "-", row.name or "-", row.status, _remark(row)) for row in found
    ]
    print(columns(table))
    return 0


def rows(plugins: Plugins) -> list[Row]:
    """Every component with its probe's answer, then nothing hidden: broken and blocked plugins have a row too."""
    listed = []
    for kind in KINDS:
        for found in plugins.found(kind):
            probe = found.probe()
            listed.append(
                Row(
                    distribution=found.distribution,
                    version=found.version,
                    plugin=found.distribution,
                    kind=kind,
                    name=found.name,
                    status="available" if probe.available else "unavailable",
                    reason=probe.reason,
                    cure=probe.cure,
                    summary=found.component.summary,
                )
            )
    order = {p.distribution: i for i, p in enumerate(plugins.plugins)}
    listed.sort(key=lambda row: order[row.distribution])
    return [*listed, *(_without_components(p) for p in plugins.plugins if p.error is not None or p.blocked)]


def columns(table: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns, two spaces apart."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table)


def _without_components(plugin: Plugin) -> Row:
    broken = plugin.error is not None
    return Row(
        distribution=plugin.distribution,
        version=plugin.version,
        plugin=plugin.name,
        kind=None,
        name=None,
        status="broken" if broken else "blocked",
        reason=(plugin.error or "MMRL_PLUGINS or MMRL_DISABLE_PLUGINS").strip().splitlines()[-1],
        cure="mmrl doctor shows the traceback" if broken else "",
        summary="",
    )


def _remark(row: Row) -> str:
    if row.status == "available":
        return f"{row.summary} ({row.reason})" if row.reason else row.summary
    return f"{row.reason}. Cure: {row.cure}" if row.cure else row.reason
