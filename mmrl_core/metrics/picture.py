"""The picture of a run: reward, and where the time of each step went. This module imports no torch."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmrl_core.errors import ObserverError
from mmrl_core.metrics.jsonl import read_metrics

_PHASES: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("generate", ("rollout",), "#4477AA"),
    (
        "reward",
        ("rule_reward", "reward_model", "non_overlap_rule_reward", "non_overlap_reward_model"),
        "#CCBB44",
    ),
    ("old log-probs", ("old_log_p",), "#AA3377"),
    ("reference", ("reference_model", "non_overlap_reference_model"), "#EE6677"),
    ("update", ("update",), "#228833"),
    ("weights", ("weights", "resharding_to_infer", "resharding_to_train"), "#66CCEE"),
    ("evaluation", ("eval",), "#997755"),
    ("checkpoint", ("checkpoint",), "#555555"),
)
"""Label, entries of timing/, colour (Paul Tol's bright scheme: told apart with colour-blind eyes)."""

_BARS_UP_TO = 150
"""With more steps, bars become areas and points a line."""


_NEGLIGIBLE = 0.003
"""Phases with a smaller share of the run's time are part of "other": they could not be seen."""


def draw_progress(metrics_jsonl: Path, png: Path) -> None:
    """Draw the run's rows to a PNG: above the mean score of each step, its moving average and held-out scores, below
    the seconds of each step by phase.

    Raises ObserverError when the file cannot be read or holds no row.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    try:
        rows = read_metrics(metrics_jsonl)
    except OSError as error:
        raise ObserverError(f"{metrics_jsonl}: cannot be read: {error}") from error
    if not rows:
        raise ObserverError(f"{metrics_jsonl}: holds no step yet; there is nothing to draw")
    figure = Figure(figsize=(9.0, 6.0), dpi=150, layout=ConstrainedLayoutEngine(hspace=0.06))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    _draw_reward(above, rows)
    _draw_time(below, rows)
    steps = [row["step"] for row in rows]
    below.set_xlim(min(steps) - 0.6, max(steps) + 0.6)
    below.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    below.set_xlabel("step")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
    beside = png.with_name(f".{png.name}.partial")
    figure.savefig(beside, format="png")
    os.replace(beside, png)


def _draw_reward(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    steps = [row["step"] for row in rows]
    mean = _column(rows, "grpo/score/mean")
    low, high = _column(rows, "grpo/score/min"), _column(rows, "grpo/score/max")
    if _informative(low, high):
        axes.fill_between(steps, low, high, color="#4477AA", alpha=0.10, linewidth=0, label="lowest to highest sample")
    marker = {"marker": "o", "markersize": 2.5} if len(rows) <= _BARS_UP_TO else {}
    axes.plot(steps, mean, color="#4477AA", alpha=0.45, linewidth=1, label="mean of the step", **marker)
    window = max(3, min(50, len(rows) // 6))
    if len(rows) > window:
        axes.plot(
            steps,
            moving_average(mean, window),
            color="#4477AA",
            linewidth=2.4,
            label=f"mean of the last {window} steps",
        )
    held_out = [(row["step"], row["eval/score/mean"]) for row in rows if row.get("eval/score/mean") is not None]
    if held_out:
        axes.plot(
            *zip(*held_out, strict=True), color="#EE6677", marker="D", markersize=5, linewidth=1.2, label="held-out"
        )
        for position, (step, value) in enumerate(held_out):
            if position in (0, len(held_out) - 1):
                axes.annotate(
                    f"{value:.2f}",
                    (step, value),
                    xytext=(0, 7),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                    color="#BB3344",
                    bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8},
                )
    axes.set_ylabel("reward")
    axes.set_title(_headline(mean), loc="left", fontsize=11, fontweight="bold")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)


def _draw_time(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    steps = [row["step"] for row in rows]
    total = _zero_filled(_column(rows, "timing/all"))
    stack: list[tuple[str, str, list[float]]] = []
    for label, names, colour in _PHASES:
        columns = [_zero_filled(_column(rows, f"timing/{name}")) for name in names]
        seconds = [math.fsum(values) for values in zip(*columns, strict=True)]
        if math.fsum(seconds) > _NEGLIGIBLE * math.fsum(total):
            stack.append((label, colour, seconds))
    known = (
        [math.fsum(values) for values in zip(*(s for _, _, s in stack), strict=True)] if stack else [0.0] * len(rows)
    )
    rest = [max(0.0, a - k) for a, k in zip(total, known, strict=True)]
    if any(rest):
        stack.append(("other", "#BBBBBB", rest))
    if len(rows) <= _BARS_UP_TO:
        bottom = [0.0] * len(rows)
        for label, colour, seconds in stack:
            axes.bar(steps, seconds, bottom=bottom, width=0.85, color=colour, label=label)
            bottom = [b + s for b, s in zip(bottom, seconds, strict=True)]
    elif stack:
        axes.stackplot(
            steps,
            [s for _, _, s in stack],
            colors=[c for _, c, _ in stack],
            labels=[name for name, _, _ in stack],
            lw=0,
        )
    axes.set_ylabel("seconds")
    late = sorted(total[len(total) // 2 :])
    axes.set_title(f"time of a step: {late[len(late) // 2]:.2f} s (median of the later half)", loc="left", fontsize=10)
    if stack:
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """The mean of the last `window` values at each place (of fewer at the start); NaNs are left out."""
    averages = []
    for end in range(1, len(values) + 1):
        recent = [v for v in values[max(0, end - window) : end] if not math.isnan(v)]
        averages.append(math.fsum(recent) / len(recent) if recent else math.nan)
    return averages


def _headline(mean: Sequence[float]) -> str:
    known = [v for v in mean if not math.isnan(v)]
    if len(known) < 10:
        return "reward"
    first, last = math.fsum(known[:5]) / 5, math.fsum(known[-5:]) / 5
    return f"reward: {first:.2f} in the first 5 steps, {last:.2f} in the last 5"


def _informative(low: Sequence[float], high: Sequence[float]) -> bool:
    """A band between two constants (rewards of 0 and 1) says nothing and is not drawn."""
    pairs = {(a, b) for a, b in zip(low, high, strict=True) if not (math.isnan(a) or math.isnan(b))}
    return len(pairs) > max(3, len(low) // 5)


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """One metric over the rows; NaN where it is missing."""
    return [math.nan if row.get(name) is None else float(row[name]) for row in rows]


def _zero_filled(values: Sequence[float]) -> list[float]:
    return [0.0 if math.isnan(v) else v for v in values]
