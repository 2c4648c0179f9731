"""Reads the schemas of the operators that the patches call out of torch-npu wheels, without installing them.

    pip download --no-deps --only-binary=:all: torch-npu==2.13.0 -d wheels
    python extract_schemas.py wheels/torch_npu-2.13.0-*.whl        # writes schemas/torch_npu-2.13.0.json

A wheel holds the declarations from which its C++ is generated, and in the library the names of the backward functions.
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "schemas"
_DECLARATIONS = re.compile(r"torch_npu/csrc/aten/npu_native_functions.*\.yaml")
_LIBRARY = "torch_npu/lib/libtorch_npu.so"
OPTIMIZER = "_fused_adamw_"
"""The operator behind `torch.optim.AdamW(fused=True)`."""


def extract(wheel: Path, operators: Collection[str]) -> dict[str, dict[str, Any]]:
    """Operator -> its schema, and whether the library has a backward function for it.

    Raises KeyError naming an operator that the wheel does not declare.
    """
    with zipfile.ZipFile(wheel) as archive:
        found: dict[str, str] = {}
        for name in archive.namelist():
            if _DECLARATIONS.fullmatch(name):
                for schema in _schemas(yaml.safe_load(archive.read(name))):
                    found.setdefault(schema.partition("(")[0], schema)
        library = archive.read(_LIBRARY)
    return {
        operator: {
            "schema": found[operator],
            "backward": _backward_name(operator).encode() in library,
        }
        for operator in sorted(operators)
    }


def version_of(wheel: Path) -> str:
    """`torch_npu-2.13.0-cp311-...whl` -> `2.13.0`."""
    return wheel.name.split("-")[1]


def text(schemas: dict[str, dict[str, Any]]) -> str:
    """As the files of `schemas/` hold them."""
    return json.dumps(schemas, indent=2) + "\n"


def _schemas(declared: Any) -> Iterator[str]:
    """Every string `name(arguments) -> result` in the file, whatever section it stands in."""
    if isinstance(declared, dict):
        for key, value in declared.items():
            if key == "func" and isinstance(value, str):
                yield value
            else:
                yield from _schemas(value)
    elif isinstance(declared, list):
        for value in declared:
            if isinstance(value, str) and "->" in value:
                yield value
            else:
                yield from _schemas(value)


def _backward_name(operator: str) -> str:
    """`npu_rms_norm` -> `NpuRmsNormBackward0`, the class of its grad_fn."""
    return "".join(part.capitalize() for part in operator.split("_")) + "Backward0"


if __name__ == "__main__":
    from npu_calls import called_operators

    for path in map(Path, sys.argv[1:]):
        target = FOLDER / f"torch_npu-{version_of(path)}.json"
        FOLDER.mkdir(exist_ok=True)
        target.write_text(text(extract(path, {*called_operators(), OPTIMIZER})), encoding="utf-8")
        print(target)
