"""The core spells the name of no accelerator outside mmrl_core/devices, and a fourth device needs no change to it."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CORE = Path(__file__).parents[3] / "mmrl_core"
NAMES = re.compile(r"(?<![a-z])(cuda|npu|hip|xpu|hccl|nccl)(?![a-z])", re.IGNORECASE)


def documentation(tree: ast.AST) -> set[int]:
    """Ids of the string nodes that are docstrings: expressions by themselves."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def spelled(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every literal, attribute and imported name that is an accelerator's."""
    tree = ast.parse(source)
    written = documentation(tree)
    for node in ast.walk(tree):
        text: Any = None
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in written:
            text = node.value
        elif isinstance(node, ast.Attribute):
            text = node.attr
        elif isinstance(node, ast.alias):
            text = node.name
        if text is not None and NAMES.search(text):
            yield node.lineno, text


def test_the_core_names_no_accelerator() -> None:
    found = [
        f"{path.relative_to(CORE.parent)}:{line}: {text!r}"
        for path in sorted(CORE.rglob("*.py"))
        if path.relative_to(CORE).parts[0] != "devices"
        for line, text in spelled(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "code",
    [
        'x.to("cuda")',
        'x.to("npu:0")',
        "torch.cuda.synchronize()",
        "x.npu()",
        "import torch_npu",
        'f"cuda:{rank}"',
        '{"npu": 1}',
        'backend = "cpu:gloo,npu:hccl"',
    ],
)
def test_the_check_sees_each_way_of_spelling_one(code: str) -> None:
    assert list(spelled(code))


@pytest.mark.parametrize("code", ['"""Runs on cuda."""', 'x.to("cpu")', 'hint = "input"', "x.to(device)"])
def test_the_check_lets_other_things_be(code: str) -> None:
    assert not list(spelled(code))


ABACUS = """
from mmrl_core import Component, EnvironmentVariable, Probe, hookimpl

mmrl_api = 1

@hookimpl
def mmrl_device_ops():
    return [Component(name="abacus", summary="Beads on wires", target="abacus_parts:Abacus",
                      probe="abacus_plugin:probe", environment="abacus_plugin:wants")]

def probe():
    return Probe(available=True, reason="13 wires")

def wants(recipe, *, ranks, nodes):
    return [EnvironmentVariable(name="ABACUS_WIRES", value=str(ranks * nodes), reason="one a rank"),
            EnvironmentVariable(name="LD_PRELOAD", value="/lib/bead's.so", reason="beads", extends=True)]
"""


def test_a_fourth_device_needs_no_change_to_the_core(site: Any) -> None:
    """Listed, examined, chosen by `auto`, asked for its environment, checked in recipes: by declaring it alone."""
    site.install("abacus", ABACUS, modules={"abacus_parts": "class Abacus: name = 'abacus'"})
    rows = json.loads(site.mmrl("plugins", "--json").stdout)
    assert ("device", "abacus", "available") in {(row["kind"], row["name"], row["status"]) for row in rows}
    assert "ok      device abacus (abacus): 13 wires" in site.mmrl("doctor").stdout
    work = site.folder.parent / "work"
    (work / "recipe.yaml").write_text(
        "model: {path: a/model}\nsampling: {max_new_tokens: 4}\ndata: arithmetic\nrewards: [numeric]\n"
        "algorithm: {steps: 1, prompts_per_step: 1, samples_per_prompt: 2}\n"
    )
    checked = site.mmrl("recipe", "check", "recipe.yaml", "device=auto")
    assert "device=abacus:abacus" in checked.stdout, checked.stdout + checked.stderr
    printed = site.mmrl("env", "abacus", "recipe.yaml", "--ranks", "3", "--nodes", "2")
    assert printed.stdout.splitlines() == [
        "# one a rank",
        "export ABACUS_WIRES=6",
        "# beads",
        """export LD_PRELOAD="${LD_PRELOAD:+$LD_PRELOAD:}"'/lib/bead'"'"'s.so'""",
    ], printed.stderr
    told = json.loads(site.mmrl("env", "auto", "recipe.yaml", "--json").stdout)
    assert told["ABACUS_WIRES"] == {"value": "1", "extends": False, "reason": "one a rank"}
