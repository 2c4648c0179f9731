"""A comparison as a table for people and as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mmrl_core.launch.resume import differences
from mmrl_core.verify.findings import Place, Row

if TYPE_CHECKING:
    from mmrl_core.verify.compare import Comparison

_VERSIONS = ("torch", "transformers", "mmrl-core")


def table(comparison: Comparison) -> str:
    """The header, one line a phase, and the verdict with the first place of disagreement."""
    a, b = comparison.left, comparison.right
    lines = [
        *(f"{side}: {_combination(facts)}" for side, facts in (("first ", a), ("second", b))),
        *_changed(a["combination"], b["combination"]),
        f"batch : {a['groups']} prompts, {a['samples']} samples, {a['actions']} actions, advantages from "
        f"{'fixed numbers' if a['advantages'] == 'synthetic' else 'the rewards'}; tolerances of {comparison.dtype}",
    ]
    if a["form"] == "adapter":
        lines.append("weights and gradients: of the LoRA adapters only")
    cells = [("", "first", "second", "difference", "tolerance", ""), *(_cells(row) for row in comparison.rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(6)]
    lines.append("")
    for line in cells:
        numbers = "  ".join(text.rjust(width) for text, width in zip(line[1:5], widths[1:5], strict=True))
        lines.append(f"{line[0]:<{widths[0]}}  {numbers}  {line[5]}".rstrip())
    return "\n".join([*lines, "", verdict(comparison)])


def verdict(comparison: Comparison) -> str:
    """One line when they are equal, else where they first differ."""
    row = comparison.first
    if row is None:
        return f"equal: {len(comparison.rows)} comparisons within the tolerances of {comparison.dtype}"
    place = row.place
    assert place is not None
    lines = [f"first disagreement: {row.phase}: {place.what}", *_place_lines(place)]
    if row.of > 1:
        lines.append(f"  {row.beyond} of {row.of} {row.unit} differ by more than the tolerance")
    if comparison.hint:
        lines.append(f"  {comparison.hint}")
    return "\n".join(lines)


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Plain values; numbers that JSON does not have (NaN, infinity) are null."""
    first = comparison.first
    report = {
        "equal": first is None,
        "tolerances": {"of": comparison.dtype, **asdict(comparison.tolerances)},
        "first_disagreement": None if first is None else {"phase": first.phase, **asdict(_required(first.place))},
        "hint": comparison.hint,
        "rows": [{**asdict(row), "agrees": row.agrees} for row in comparison.rows],
        "first": _facts(comparison.left),
        "second": _facts(comparison.right),
    }
    cleaned: dict[str, Any] = _without_nan(report)
    return cleaned


def _required(place: Place | None) -> Place:
    assert place is not None
    return place


def _place_lines(place: Place) -> list[str]:
    lines = []
    if not math.isnan(place.left) or not math.isnan(place.right):
        lines.append(f"  first {place.left:.9g}, second {place.right:.9g}")
        lines.append(f"  difference {place.difference:.3g}, tolerance {place.tolerance:.3g}")
    if place.note:
        lines.append(f"  {place.note}")
    return lines


def _cells(row: Row) -> tuple[str, str, str, str, str, str]:
    said = "equal" if row.agrees else "DIFFERS"
    if row.details.get("not_compared"):
        said = f"not compared: {row.details['not_compared']}"
    tolerance = "" if math.isinf(row.tolerance) else f"{row.tolerance:.1e}"
    return (row.phase, _number(row.left), _number(row.right), f"{row.difference:.1e}", tolerance, said)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.7g}"


def _combination(facts: dict[str, Any]) -> str:
    words = facts["combination"]
    ranks = f"{facts['world']} rank{'s' if facts['world'] > 1 else ''}"
    replicas = f", {facts['replicas']} replica{'s' if facts['replicas'] > 1 else ''}" if facts["world"] > 1 else ""
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in _VERSIONS if name in facts["versions"])
    return (
        f"{words['device']['name']}, {words['backend']['name']}, {words['rollout']['name']}, {facts['dtype']}, "
        f"{ranks}{replicas} ({versions})"
    )


def _changed(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """One line for each field that differs; a component of another name is one line with its options."""
    lines, kept = [], sorted(set(a) | set(b))
    for section in list(kept):
        old, new = a.get(section), b.get(section)
        if isinstance(old, dict) and isinstance(new, dict) and old.get("name") != new.get("name"):
            lines.append(f"change: {section}: {_component(old)} -> {_component(new)}")
            kept.remove(section)
    rows = differences({name: a.get(name) for name in kept}, {name: b.get(name) for name in kept}, "")
    return [*lines, *(f"change: {name}: {_short(old)} -> {_short(new)}" for name, old, new in rows)]


def _component(choice: dict[str, Any]) -> str:
    options = ", ".join(f"{name}={value}" for name, value in choice.items() if name != "name" and value is not None)
    return f"{choice['name']}({options})"


def _short(value: Any) -> str:
    return "(not set)" if value is None else str(value)


def _facts(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name not in ("rows", "names")}


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
