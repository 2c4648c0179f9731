"""Charts as inline SVG, without a library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = {
    "rollout": "#4477aa",
    "old_log_p": "#66ccee",
    "reference_model": "#228833",
    "update": "#ee6677",
    "resharding_to_infer": "#ccbb44",
    "rest": "#9a9aa5",
}
"""By phase; told apart by people who do not see all colours (Paul Tol's bright scheme)."""

WIDTH = 960
_LEFT, _RIGHT, _ROW = 230, 90, 34


@dataclass(frozen=True, kw_only=True)
class Slice:
    """A part of a bar."""

    name: str
    value: float


def stacked_bars(bars: Sequence[tuple[str, Sequence[Slice]]], title: str) -> str:
    """A horizontal bar for each (label, slices), its total beside it; each slice says its value when pointed at."""
    largest = max(sum(s.value for s in slices) for _, slices in bars)
    scale = (WIDTH - _LEFT - _RIGHT) / largest if largest else 0.0
    height = _ROW * len(bars) + 34
    parts = [_open(height, title), _text(0, 16, title, weight=600)]
    for row, (label, slices) in enumerate(bars):
        top = 28 + row * _ROW
        parts.append(_text(_LEFT - 10, top + 16, label, anchor="end"))
        x = float(_LEFT)
        total = sum(s.value for s in slices)
        for part in slices:
            width = part.value * scale
            said = f"{label}: {part.name} {part.value:.3g} ms, {part.value / total:.1%}"
            parts.append(
                f'<rect x="{x:.2f}" y="{top}" width="{width:.2f}" height="24" fill="{COLOURS[part.name]}">'
                f"<title>{escape(said)}</title></rect>"
            )
            x += width
        parts.append(_text(x + 8, top + 16, f"{total:.3g}"))
    return "\n".join([*parts, "</svg>"])


def history_chart(title: str, points: Sequence[tuple[str, float, float, float]]) -> str:
    """A line through (label, low, middle, high) in their order, with a band from low to high, from zero upwards."""
    height, left, right, top, bottom = 200, 60, 20, 34, 40
    ceiling = nice_ceiling(max(high for *_, high in points))
    step = (WIDTH - left - right) / (len(points) - 1)

    def x(i: int) -> float:
        return left + i * step

    def y(value: float) -> float:
        return height - bottom - value / ceiling * (height - top - bottom)

    parts = [_open(height, title), _text(0, 16, title, weight=600)]
    for tick in (0.0, ceiling / 2, ceiling):
        parts.append(
            f'<line x1="{left}" x2="{WIDTH - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#9a9aa5" '
            'stroke-width="0.5"/>'
        )
        parts.append(_text(left - 8, y(tick) + 4, f"{tick:g}", anchor="end", size=12))
    outline = [(x(i), y(p[3])) for i, p in enumerate(points)] + [
        (x(i), y(p[1])) for i, p in reversed(list(enumerate(points)))
    ]
    parts.append(f'<polygon points="{_path(outline)}" fill="#4477aa" fill-opacity="0.2"/>')
    line = _path([(x(i), y(p[2])) for i, p in enumerate(points)])
    parts.append(f'<polyline points="{line}" fill="none" stroke="#4477aa" stroke-width="2"/>')
    for i, (label, low, middle, high) in enumerate(points):
        said = f"{label}: {middle:.4g} ms ({low:.4g} to {high:.4g})"
        parts.append(
            f'<circle cx="{x(i):.1f}" cy="{y(middle):.1f}" r="4" fill="#4477aa"><title>{escape(said)}</title></circle>'
        )
    for i, anchor in ((0, "start"), (len(points) - 1, "end")):
        parts.append(_text(x(i), height - 14, points[i][0].split(",")[0], anchor=anchor, size=12))
    return "\n".join([*parts, "</svg>"])


def nice_ceiling(value: float) -> float:
    """The smallest of 1, 2, 5, 10, 20, ... that is not below `value` > 0."""
    assert value > 0
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value * (1 - 1e-9))


def _open(height: int, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" '
        f'aria-label="{escape(title, quote=True)}" font-family="inherit">'
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 14, weight: int = 400) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}">'
        f"{escape(text)}</text>"
    )


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
