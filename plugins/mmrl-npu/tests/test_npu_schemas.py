"""Every call of an operator of torch_npu in the source binds to its schema, in each version that the patches are for.

The schemas come from the wheels, by `extract_schemas.py`; nothing of torch_npu is imported or installed.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import extract_schemas
import npu_reference_ops
import npu_wheels
import pytest
import torch
from mmrl_npu.patches.declared import TORCH_NPU
from npu_calls import Call, called_operators, calls, mentions
from packaging.specifiers import SpecifierSet

VERSIONS = ("2.7.1", "2.13.0", "2.14.0")


def committed(version: str) -> dict[str, dict[str, Any]]:
    """What was extracted from that version's wheel."""
    found: dict[str, dict[str, Any]] = json.loads(
        (extract_schemas.FOLDER / f"torch_npu-{version}.json").read_text(encoding="utf-8")
    )
    return found


def parsed(schema: str) -> Any:
    """PyTorch's own reading of it."""
    return torch._C.parse_schema(f"npu::{schema}")


def problem(schema: Any, call: Call) -> str | None:
    """Why the operator would refuse the call; None when it would not."""
    arguments = schema.arguments
    by_position = [a.name for a in arguments if not a.kwarg_only]
    given = by_position[: call.positional]
    if call.positional > len(by_position):
        return f"{call.positional} arguments by position, {len(by_position)} are taken"
    unknown = [name for name in call.keywords if name not in {a.name for a in arguments}]
    if unknown:
        return f"unknown {unknown}"
    twice = set(given) & set(call.keywords)
    if twice:
        return f"{sorted(twice)} twice"
    missing = [
        a.name
        for a in arguments
        if a.name not in given and a.name not in call.keywords and not a.has_default_value() and not a.is_out
    ]
    return f"missing {missing}" if missing else None


def test_the_patches_are_for_the_versions_whose_schemas_are_here() -> None:
    """The range begins with the oldest of them and ends behind the newest."""
    held = {file.stem.removeprefix("torch_npu-") for file in extract_schemas.FOLDER.glob("*.json")}
    assert held == set(VERSIONS)
    covered = SpecifierSet(TORCH_NPU)
    assert all(covered.contains(version) for version in VERSIONS)
    assert not covered.contains("2.7.0")
    assert not covered.contains("2.15.0")


def test_calls_are_found() -> None:
    """The search knows all five operators, and nothing names an operator without calling it there and then."""
    assert called_operators() == {
        "npu_fusion_attention",
        "npu_gelu",
        "npu_rms_norm",
        "npu_rotary_mul",
        "npu_swiglu",
    }
    assert mentions() == called_operators()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("call", calls(), ids=lambda call: f"{call.operator}-{call.where}")
def test_every_call_binds(call: Call, version: str) -> None:
    """Names, positions, and the types of literal arguments."""
    schema = parsed(committed(version)[call.operator]["schema"])
    assert problem(schema, call) is None
    types = {argument.name: str(argument.type) for argument in schema.arguments}
    kinds = {"int": int, "str": str, "float": (int, float), "bool": bool}
    for name, value in call.constants.items():
        assert isinstance(value, kinds[types[name]]), f"{name}={value!r} for {types[name]}"


@pytest.mark.parametrize("version", VERSIONS)
def test_every_operator_has_a_backward(version: str) -> None:
    """Training differentiates through all that is called."""
    schemas = committed(version)
    assert {name for name in called_operators() if not schemas[name]["backward"]} == set()


@pytest.mark.parametrize("call", calls(), ids=lambda call: f"{call.operator}-{call.where}")
def test_the_first_argument_goes_by_position(call: Call) -> None:
    """It is called `self` in the declarations and `input` in the compiled library."""
    assert call.positional >= 1


def test_every_operator_is_emulated() -> None:
    """By one of its own, so that everything that a patch can call runs on the emulated device and in these tests."""
    assert {operator.__name__ for operator in npu_reference_ops.OPERATORS} == called_operators()


@pytest.mark.parametrize("call", calls(), ids=lambda call: f"{call.operator}-{call.where}")
def test_the_emulation_takes_every_call(call: Call) -> None:
    """As many arguments by position, and the others by these names."""
    operator = next(o for o in npu_reference_ops.OPERATORS if o.__name__ == call.operator)
    inspect.signature(operator).bind(*range(call.positional), **dict.fromkeys(call.keywords))


@pytest.mark.parametrize("version", VERSIONS)
def test_the_reference_operators_have_the_vendors_signatures(version: str) -> None:
    """What the numerical tests put in the place of torch_npu takes no argument that the real one refuses."""
    for operator in npu_reference_ops.OPERATORS:
        schema = parsed(committed(version)[operator.__name__]["schema"])
        known = [a.name for a in schema.arguments]
        ours = list(inspect.signature(operator).parameters.values())
        newer = {"npu_rotary_mul": {"rotate"}}.get(operator.__name__, set()) if version == "2.7.1" else set()
        assert [p.name for p in ours if p.name not in newer] == known[: len(ours) - len(newer)]
        for argument, parameter in zip(schema.arguments, ours, strict=False):
            if argument.has_default_value():
                assert argument.default_value == parameter.default


@pytest.mark.parametrize("version", VERSIONS)
def test_the_optimizers_operator_is_torchs_own(version: str) -> None:
    """`torch.optim.AdamW(fused=True)` runs aten::_fused_adamw_, and torch-npu implements it with that very schema."""
    theirs = parsed(committed(version)[extract_schemas.OPTIMIZER]["schema"])
    ours = torch.ops.aten._fused_adamw_.default._schema
    assert [(a.name, str(a.type)) for a in theirs.arguments] == [(a.name, str(a.type)) for a in ours.arguments]


@pytest.mark.parametrize(
    ("positional", "keywords", "said"),
    [
        (2, ("eps",), "unknown"),
        (4, (), "by position"),
        (2, ("gamma",), "twice"),
        (1, ("epsilon",), "missing"),
    ],
)
def test_a_wrong_call_is_found(positional: int, keywords: tuple[str, ...], said: str) -> None:
    """The check can fail."""
    call = Call(operator="npu_rms_norm", positional=positional, keywords=keywords, constants={}, where="here")
    assert said in str(problem(parsed(committed("2.13.0")["npu_rms_norm"]["schema"]), call))


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("version", VERSIONS)
def test_the_committed_schemas_are_those_of_the_wheel(version: str, tmp_path: Path) -> None:
    """In each of them: what was committed was extracted by this very program."""
    wheel = npu_wheels.download(version, tmp_path)
    operators = {*called_operators(), extract_schemas.OPTIMIZER}
    assert extract_schemas.extract(wheel, operators) == committed(version)
