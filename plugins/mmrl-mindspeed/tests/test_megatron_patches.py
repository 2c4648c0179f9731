"""The CPU patches on the installed megatron-core: narrow, complete, and gone when they are taken back."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from mmrl_mindspeed import probe
from mmrl_mindspeed.cpu_patches import apply_for

from mmrl_core.errors import BackendError
from mmrl_core.testing.patches import PatchConformance


class TestPatches(PatchConformance):
    distribution = "mmrl-mindspeed"
    packages = ("megatron.core", "mindspeed")


def test_torch_is_not_touched() -> None:
    of_torch = {name: getattr(torch, name) for name in ("zeros", "tensor", "empty", "cuda")}
    of_cuda = {name: getattr(torch.cuda, name) for name in ("current_device", "synchronize", "get_rng_state")}
    kind = torch.Tensor.type
    with apply_for("cpu") as handle:
        assert {p.name for p in handle.patches} >= {"cpu-torch", "cpu-type-names", "cpu-tied-embeddings"}
        assert all(getattr(torch, name) is value for name, value in of_torch.items())
        assert all(getattr(torch.cuda, name) is value for name, value in of_cuda.items())
        assert torch.Tensor.type is kind


def test_megatron_sees_a_cpu_and_others_see_torch() -> None:
    with apply_for("cpu"):
        from megatron.core.tensor_parallel import random

        theirs = random.torch
        assert theirs.zeros(2, device="cuda").device.type == "cpu"
        assert theirs.tensor([1], device=theirs.cuda.current_device()).device.type == "cpu"
        assert theirs.zeros(2, device="meta").device.type == "meta"
        assert theirs.Tensor is torch.Tensor
        assert theirs.cuda.is_available() == torch.cuda.is_available()
        if not torch.cuda.is_available():
            with pytest.raises((AssertionError, RuntimeError)):
                torch.zeros(2, device="cuda")


def test_random_states_are_the_cpu_generators() -> None:
    with apply_for("cpu"):
        from megatron.core.tensor_parallel import random

        tracker = random.CudaRNGStatesTracker()
        torch.manual_seed(1)
        outside = torch.get_rng_state()
        tracker.add("one", 5)
        assert torch.equal(torch.get_rng_state(), outside)
        with tracker.fork("one"):
            first = torch.rand(3)
        with tracker.fork("one"):
            second = torch.rand(3)
        assert torch.equal(torch.get_rng_state(), outside)
        both = torch.rand(6, generator=torch.Generator().manual_seed(5))
        assert torch.equal(torch.cat([first, second]), torch.cat([both[:3], second]))
        assert not torch.equal(first, second)


def test_elsewhere_nothing_for_cpu_is_applied() -> None:
    with apply_for("npu") as handle:
        assert handle.patches == []
    with apply_for("cuda") as handle:
        assert not [p for p in handle.patches if p.name.startswith("cpu-")]


@pytest.mark.parametrize(
    ("version", "python", "said"),
    [
        ("0.18.0", ">=3.10", "megatron-core 0.18.0 is installed"),
        ("0.11.0", ">=3.10", "this plugin works with"),
        ("0.16.1", ">=3.99", "megatron-core 0.16.1 needs Python >=3.99, and this is"),
    ],
)
def test_a_version_that_does_not_fit_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, version: str, python: str, said: str
) -> None:
    info = tmp_path / f"megatron_core-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: megatron-core\nVersion: {version}\nRequires-Python: {python}\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    answer = probe.megatron()
    assert not answer.available
    assert said in answer.reason
    assert "pip install" in answer.cure
    with pytest.raises(BackendError, match=r"backend megatron: megatron-core .*Cure: pip install"):
        apply_for("cpu")
