"""Shows every Python process with this folder on its PYTHONPATH a machine with two NPUs: the files below `machine/`.

Python imports a module of this name when it starts.
"""

from __future__ import annotations

from pathlib import Path

from mmrl_npu import machine

_SEEN = machine.Machine(
    root=Path(__file__).parent / "machine",
    environment={"ASCEND_HOME_PATH": "/usr/local/Ascend/cann"},
    distributions={"torch": "2.7.1+cpu", "torch-npu": "2.7.1.post2"},
)
machine.here = lambda: _SEEN
