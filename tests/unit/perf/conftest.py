"""Results as `mmrl perf run` writes them, with numbers that are easy to follow."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mmrl_core.perf.results import Measured, NotMeasured, Result, Round


def measured(name: str = "cpu+fsdp2+hf+text", *, scale: float = 1.0, peak: float = 1.0, **changes: Any) -> Measured:
    """Two processes of three steps; `all` of the first has median 0.2 s, of the second 0.22 s."""
    rounds = [
        Round(
            steps=[
                {"rollout": s * scale / 2, "update": s * scale / 4, "all": s * scale, "e2e_tps": 100 / s}
                for s in column
            ],
            memory=[[{"all": int(3e8 * peak), "update": int(2e8 * peak)}]],
        )
        for column in ((0.2, 0.19, 5.0), (0.22, 0.21, 0.23))
    ]
    values = {
        "name": name,
        "modality": "text",
        "model": "random",
        "components": ["mmrl-core 0.1.0"],
        "versions": {"torch": "2.13.0"},
        "ranks": 1,
        "work": {"prompts": 4},
        "rounds": rounds,
    }
    return Measured.model_validate(values | changes)


def result(*combinations: Measured, machine: str = "m1", created: str = "2026-01-01", commit: str = "abc") -> Result:
    return Result(
        schema_version=1,
        created=created,
        commit=commit,
        fingerprint={"id": machine, "device": "cpu", "cpu": "A processor", "cores": 2, "threads": 1, "system": "Linux"},
        size="tiny",
        load_average=[0.5, None],
        measured=list(combinations),
        unavailable=[NotMeasured(name="cpu+fsdp2+flow+text", reason="rollout: flow denoises")],
    )


@pytest.fixture
def made() -> SimpleNamespace:
    """`made.measured(...)` and `made.result(...)`."""
    return SimpleNamespace(measured=measured, result=result)
