"""The page: well-formed, complete in itself, and drawn to scale."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mmrl_core.errors import PerfError
from mmrl_core.perf.charts import Slice, nice_ceiling, stacked_bars
from mmrl_core.perf.report import Peer, report_page


class Checked(HTMLParser):
    """Every tag is closed in order; attributes and text are kept."""

    VOID = frozenset({"meta", "line", "rect", "circle", "polygon", "polyline"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    spread = {"median": 0.27, "lower_quartile": 0.26, "upper_quartile": 0.28, "count": 10}
    path = tmp_path / "text_trl_16.json"
    content = {
        "summary": {"ours": spread, "ours/trl": spread},
        "commit": "abc",
        "fingerprint": {"id": "m1"},
        "job": {"tokens": 16, "model": "/somewhere/else"},
    }
    path.write_text(json.dumps(content))
    return path


def test_the_page_is_well_formed_and_loads_nothing(made: Any, peer: Path) -> None:
    results = [made.result(made.measured(), created="2026-01-01"), made.result(made.measured(), created="2026-01-02")]
    page = report_page(results, [Peer.load(peer)])
    checked = Checked(page)
    assert not [a for _, attributes in checked.tags for a in attributes if a in ("src", "href", "xlink:href")]
    assert "script" not in {tag for tag, _ in checked.tags}
    assert not re.search(r"https?:|url\(|@import", page)
    text = " ".join(checked.words)
    for said in ("cpu+fsdp2+hf+text", "rollout: flow denoises", "0.27", "ours/trl", "A processor", "300.0"):
        assert said in text
    assert "/somewhere/else" not in text, "paths of a machine are nobody's business"


def test_names_are_shown_as_they_are_written(made: Any) -> None:
    page = report_page([made.result(made.measured("<b>&\"bold'"))])
    assert "<b>" not in page
    assert "<b>&\"bold'" in " ".join(Checked(page).words)


def test_bars_are_to_scale() -> None:
    slices = [Slice(name="rollout", value=30.0), Slice(name="update", value=10.0)]
    svg = stacked_bars([("a", slices), ("b", [Slice(name="update", value=80.0)])], "title")
    rects = [a for tag, a in Checked(svg).tags if tag == "rect"]
    widths = [float(a["width"] or 0) for a in rects]
    assert widths[0] / widths[1] == pytest.approx(3.0, rel=1e-3)
    assert (widths[0] + widths[1]) / widths[2] == pytest.approx(0.5, rel=1e-3)
    assert float(rects[1]["x"] or 0) == pytest.approx(float(rects[0]["x"] or 0) + widths[0], abs=0.02)


def test_what_is_left_of_a_step_is_drawn_too(made: Any) -> None:
    page = report_page([made.result(made.measured())])
    said = re.findall(r"<title>cpu\+fsdp2\+hf\+text: (\w+) [\d.]+ ms, ([\d.]+)%</title>", page)
    assert [name for name, _ in said] == ["rollout", "update", "rest"]
    assert sum(float(share) for _, share in said) == pytest.approx(100, abs=0.2)


def test_history_is_of_this_machine_and_this_work(made: Any) -> None:
    newest = made.result(made.measured(), created="2026-01-05", commit="newest")
    results = [
        newest,
        made.result(made.measured(scale=2.0), created="2026-01-01", commit="older"),
        made.result(made.measured(scale=3.0), created="2026-01-02", commit="elsewhere", machine="m2"),
        made.result(made.measured(work={"prompts": 8}), created="2026-01-03", commit="otherwork"),
    ]
    page = report_page(results)
    points = re.findall(r"<circle [^>]*cy=\"([\d.]+)\"[^>]*><title>(\w+), ", page)
    assert [commit for _, commit in points] == ["older", "newest"]
    assert float(points[0][0]) < float(points[1][0]), "twice as slow is higher up"
    assert "1 results of other machines are left out" in page


def test_there_must_be_something_to_report(tmp_path: Path) -> None:
    with pytest.raises(PerfError, match="nothing to report"):
        report_page([])
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(PerfError, match=r"x\.json: is no comparison of perf/peers"):
        Peer.load(tmp_path / "x.json")


@pytest.mark.parametrize(("value", "ceiling"), [(0.7, 1), (1.0, 1), (1.1, 2), (3, 5), (5.01, 10), (123, 200)])
def test_axes_end_at_round_numbers(value: float, ceiling: float) -> None:
    assert nice_ceiling(value) == pytest.approx(ceiling)
