"""A rank that trains, and in which nothing may import ray: whoever cannot, makes no Ray call in a step or elsewhere."""

from __future__ import annotations

import importlib
import importlib.abc
import json
import os
import sys
from pathlib import Path


class _Refused(importlib.abc.MetaPathFinder):
    attempts = 0

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        if name.partition(".")[0] == "ray":
            _Refused.attempts += 1
            raise ImportError("ray in a rank")


def main(path: Path) -> int:
    assert "ray" not in sys.modules
    sys.meta_path.insert(0, _Refused())
    status = importlib.import_module("mmrl_core.launch.worker").main(path)
    assert "ray" not in sys.modules
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
    said = {name: os.environ[name] for name in names} | {"attempts": _Refused.attempts, "nice": os.nice(0)}
    (path.parent / f"guard{os.environ['RANK']}.json").write_text(json.dumps(said))
    return int(status)
