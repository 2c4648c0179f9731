"""The table of where verl's fields went names fields that verl has; those of recipes are checked on every page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import verl
import yaml

PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "verl.md"


@pytest.fixture(scope="module")
def rows() -> list[tuple[str, str]]:
    """(verl, here) of the first table, as text."""
    text = PAGE.read_text(encoding="utf-8").partition("## Where the fields went")[2].partition("\n### ")[0]
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(("| `", "| algorithm: `"))]
    assert len(cells) > 30
    return [(left, right) for left, right in cells]


def test_verl_has_the_fields(rows: list[tuple[str, str]]) -> None:
    file = Path(verl.__file__).parent / "trainer" / "config" / "_generated_ppo_trainer.yaml"
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    for left, _ in rows:
        for field in re.findall(r"`([^`]+)`", left):
            value: Any = config["algorithm"] if left.startswith("algorithm: ") else config
            for part in field.split("."):
                assert part in value, f"verl has no field {field}"
                value = value[part]
