"""Files of results, what follows from their numbers, and what may be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmrl_core.errors import PerfError
from mmrl_core.perf.compare import comparison_table
from mmrl_core.perf.results import Result, Round, step_row
from mmrl_core.perf.tables import result_table


def test_medians_over_processes_of_medians_over_steps(made: Any) -> None:
    one = made.measured()
    assert one.round_medians("all") == [0.2, 0.22]
    assert one.seconds("all") == pytest.approx(0.21)
    assert one.band("all") == pytest.approx(1.1)
    assert one.bytes("all") == [300_000_000]
    assert one.seconds("old_log_p") is None
    assert one.bytes("rollout") == []
    assert made.measured(rounds=[made.measured().rounds[0]]).band("all") is None


def test_of_several_ranks_each_has_a_peak(made: Any) -> None:
    steps = [[{"all": 10}, {"all": 30}], [{"all": 12}, {"all": 34}], [{"all": 11}, {"all": 32}]]
    assert made.measured(ranks=2, rounds=[Round(steps=[], memory=steps)]).bytes("all") == [11, 32]


def test_a_step_keeps_phases_that_took_time() -> None:
    metrics = {"timing/all": 2.0, "timing/update": 0.0, "timing/data": 1.0, "e2e_tps": 7.0, "grad_norm": 1.0}
    assert step_row(metrics) == {"all": 2.0, "e2e_tps": 7.0}


def test_a_result_survives_the_disk(made: Any, tmp_path: Path) -> None:
    first = made.result(made.measured())
    first.save(tmp_path / "sub" / "perf.json")
    assert Result.load(tmp_path / "sub" / "perf.json") == first
    text = json.loads((tmp_path / "sub" / "perf.json").read_text())
    assert text["measured"][0]["summary"]["seconds"]["all"] == pytest.approx(0.21)
    assert text["measured"][0]["summary"]["bytes"]["update"] == [200_000_000]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "schema_version is None"),
        ('{"schema_version": 99}', "schema_version is 99, and this mmrl reads 1"),
        ('{"schema_version": 1}', "is no result of mmrl perf run: created"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(PerfError, match=said):
        Result.load(path)
    with pytest.raises(PerfError, match="cannot be read"):
        Result.load(tmp_path / "missing.json")


def test_equal_work_has_equal_keys(made: Any) -> None:
    assert made.measured().key() == made.measured(scale=2.0, components=["other 2"]).key()
    for change in ({"work": {"prompts": 8}}, {"versions": {"torch": "3"}}, {"model": "real"}, {"ranks": 2}):
        assert made.measured(**change).key() != made.measured().key()


def test_utilisation_is_known_when_peak_and_operations_are(made: Any) -> None:
    """The update takes 0.0525 s: the median of 0.05 and 0.055."""
    known = made.measured(forward_flops=7e9, peak_flops=1e12, ranks=2)
    assert known.utilisation() == pytest.approx(3 * 7e9 / (0.0525 * 2 * 1e12))
    assert made.measured(forward_flops=7e9).utilisation() is None
    assert made.measured(peak_flops=1e12).utilisation() is None


def test_the_table_says_unknown_where_nothing_is_known(made: Any) -> None:
    text = result_table(made.result(made.measured(rounds=[Round(steps=[{"all": 0.5}], memory=[])])))
    row = next(line for line in text.splitlines() if line.startswith("cpu+fsdp2+hf+text"))
    assert row.split() == ["cpu+fsdp2+hf+text", *"-----", "500", "unknown", "unknown", "unknown"]
    assert "not measured: cpu+fsdp2+flow+text: rollout: flow denoises" in text


def test_comparison_prints_ratio_and_band(made: Any) -> None:
    text = comparison_table(
        made.result(made.measured()), made.result(made.measured(scale=1.5, peak=1.01), commit="def")
    )
    row = next(line for line in text.splitlines() if line.startswith("cpu+fsdp2+hf+text, all") and "seconds" in line)
    assert row.split()[-5:] == ["1.500", "0.909", "to", "1.100", "slower"]
    assert any(line.endswith("1.010") and ", update" in line and "memory" in line for line in text.splitlines())
    same = comparison_table(made.result(made.measured()), made.result(made.measured(scale=1.05)))
    assert "slower" not in same


def test_machines_are_not_compared(made: Any) -> None:
    first, second = made.result(made.measured()), made.result(made.measured(scale=3.0, peak=2.0), machine="m2")
    with pytest.raises(PerfError, match="different machines"):
        comparison_table(first, second)
    text = comparison_table(first, second, across=True)
    assert "seconds:" not in text
    assert "3.000" not in text, "seconds of different machines say nothing"
    assert "2.000" in text, "memory does"
    assert any("rollout" in line and "share" in line and "1.000" in line for line in text.splitlines())


def test_other_work_is_not_compared(made: Any) -> None:
    with pytest.raises(PerfError, match="no combination of the same work") as caught:
        comparison_table(made.result(made.measured()), made.result(made.measured(work={"prompts": 8})))
    assert "{'prompts': 8}" in str(caught.value)
    text = comparison_table(
        made.result(made.measured(), made.measured("b")), made.result(made.measured(), made.measured("c"))
    )
    assert "only in A: b" in text
    assert "only in B: c" in text
