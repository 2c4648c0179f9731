"""Elementary functions are exact from a process's first call on: each was called once before threads share one."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from mmrl_core.vector_math import ELEMENTWISE

RECORDER = """
import json, sys
import torch
from torch.utils._python_dispatch import TorchDispatchMode

class Recorder(TorchDispatchMode):
    calls = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if args and isinstance(args[0], torch.Tensor):
            self.calls.append((func._schema.name, str(args[0].dtype), args[0].numel()))
        return func(*args, **(kwargs or {{}}))

with Recorder():
    {body}
for name in {names}:
    for dtype in ("torch.float32", "torch.float64"):
        ours = [count for called, of, count in Recorder.calls if (called, of) == (f"aten::{{name}}", dtype)]
        assert ours[:1] == [1], (name, dtype, ours)
"""


def python(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_every_function_that_pytorch_gives_to_the_vendor_library() -> None:
    """As the installed PyTorch's own source says."""
    header = Path(torch.__file__).parent / "include" / "ATen" / "cpu" / "vml.h"
    named = re.findall(r"^IMPLEMENT_VML_MKL\((\w+),", header.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(named) > 10
    assert set(named) == set(ELEMENTWISE)


@pytest.mark.parametrize(
    "body",
    [
        "from mmrl_core.devices.cpu import CpuDevice; CpuDevice().activate(0)",
        "from mmrl_core.rewards.creation import create_reward; from mmrl_core.plugins import load_plugins, Selected; "
        "found = load_plugins().get('reward', 'digits'); create_reward(Selected(found=found, options=None))",
    ],
    ids=["a rank on a CPU", "a reward whose worker uses PyTorch"],
)
def test_the_first_call_is_of_one_number(body: str) -> None:
    python(RECORDER.format(body=body, names=ELEMENTWISE))


def test_a_process_without_pytorch_stays_without() -> None:
    python(
        textwrap.dedent(
            """
            import sys
            from mmrl_core.vector_math import resolve_vector_math
            resolve_vector_math()
            assert "torch" not in sys.modules
            """
        )
    )


def test_a_worker_resolves_them_for_a_reward_that_imports_pytorch_late(tmp_path: Path) -> None:
    """Between `setup` and the first score."""
    (tmp_path / "late_reward.py").write_text(
        textwrap.dedent(
            """
            from mmrl_core import Reward, RewardResult
            from mmrl_core import vector_math

            class Late(Reward):
                def setup(self, device):
                    assert not vector_math._resolved
                    import torch
                def score(self, samples):
                    return [RewardResult(value=float(vector_math._resolved)) for _ in samples]
            """
        )
    )
    python(
        textwrap.dedent(
            f"""
            import sys
            sys.path.insert(0, {str(tmp_path)!r})
            from mmrl_core import Component
            from mmrl_core.contracts import Prompt, Sample
            from mmrl_core.plugins import Found, Selected
            from mmrl_core.recipe import RewardChoice
            from mmrl_core.rewards.executor import RewardExecutor

            component = Component(name="late", summary="", target="late_reward:Late")
            found = Found(kind="reward", component=component, distribution="none", version="0")
            sample = Sample(sample_id=0, group_id=0, prompt=Prompt(index=0, text="q"), text="a")
            with RewardExecutor([RewardChoice(name="late")], [Selected(found=found, options=None)], "cpu") as rewards:
                rewards.setup()
                (scored,) = rewards.score([sample])
            assert scored.value == 1.0, scored
            """
        )
    )
