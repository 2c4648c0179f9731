"""The table of where verl's fields went names fields that verl 0.9 has, and fields that recipes have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import verl
import yaml

from mmrl_core.recipe import Recipe

PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "verl.md"


@pytest.fixture(scope="module")
def rows() -> list[tuple[str, str]]:
    """(verl, here) of the first table, as text."""
    text = PAGE.read_text(encoding="utf-8").partition("## Where the fields went")[2].partition("\n### ")[0]
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    assert len(cells) > 30
    return [(left, right) for left, right in cells]


def test_verl_has_the_fields(rows: list[tuple[str, str]]) -> None:
    file = Path(verl.__file__).parent / "trainer" / "config" / "_generated_ppo_trainer.yaml"
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    for left, _ in rows:
        for field in re.findall(r"`([^`]+)`", left):
            value: Any = config
            for part in field.split("."):
                assert part in value, f"verl has no field {field}"
                value = value[part]


def test_recipes_have_the_fields(rows: list[tuple[str, str]]) -> None:
    sections = {name for name in Recipe.model_fields if name not in ("rollout", "name", "seed")}
    schema = Recipe.model_json_schema()
    checked = 0
    for _, right in rows:
        for field in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)", right):
            first, *rest = field.split(".")
            if first not in sections:
                continue
            place: Any = schema["properties"][first]
            for part in rest:
                name = next(iter(re.findall(r"#/\$defs/(\w+)", str(place))), None)
                if name == "Choice":  # the options of a component
                    break
                place = schema["$defs"][name]["properties"][part]
                checked += 1
    assert checked > 10
