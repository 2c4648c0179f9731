"""The policy `flow` on Megatron: the denoising checks of the kit, and the numbers of fsdp2 on one and two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from denoising_ranks import pipeline, recipe

from mmrl_core.errors import BackendError
from mmrl_core.testing.denoising import DenoisingConformance, relative
from mmrl_core.testing.stage import Rank, run_ranks


class TestFlowOnMegatron(DenoisingConformance):
    component = "flow"
    backend: ClassVar = {"name": "megatron"}
    sampling_section: ClassVar = {"steps": 5, "height": 8, "width": 8}
    prompts = ("the digit 3", "the digit 7")

    @classmethod
    def pipeline(cls, folder: Path) -> Path:
        return pipeline(folder)


@pytest.fixture(scope="module", params=[1, 2])
def seen(request: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    pipeline(folder / "model")
    run_ranks("denoising_ranks", [str(folder)], request.param, folder, timeout_s=500)
    found: dict[str, dict[str, Any]] = torch.load(folder / "seen.pt", weights_only=True)
    return found


def test_same_numbers_as_fsdp2(seen: dict[str, dict[str, Any]]) -> None:
    ours, theirs = seen["megatron"], seen["fsdp2"]
    torch.testing.assert_close(ours["log_probs"], theirs["log_probs"], atol=2e-6, rtol=0)
    assert set(ours["gradients"]) == set(theirs["gradients"])
    for name in theirs["gradients"]:
        assert relative({name: ours["gradients"][name]}, {name: theirs["gradients"][name]}) <= 1e-5, name
    assert all(torch.equal(ours["start"][name], theirs["start"][name]) for name in theirs["start"])
    moved = [{name: side["weights"][name] - side["start"][name] for name in side["start"]} for side in (ours, theirs)]
    assert relative(*moved) <= 1e-4
    for one, other in zip(ours["metrics"], theirs["metrics"], strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-9)


def test_resumes_with_another_division(seen: dict[str, dict[str, Any]]) -> None:
    """Saved by a distributed optimizer, loaded into one that is not divided."""
    for word in ("megatron", "bf16"):
        third, resumed = seen[word]["third"], seen[word]["resumed"]
        assert set(third) == set(resumed)
        assert all(torch.equal(third[name], resumed[name]) for name in third), word
        assert relative(third, seen[word]["weights"]) > 0


def test_bf16_is_near(seen: dict[str, dict[str, Any]]) -> None:
    change = relative(seen["bf16"]["weights"], seen["fsdp2"]["weights"])
    assert change < 5e-3
    assert {t.dtype for t in seen["bf16"]["weights"].values()} == {torch.bfloat16}


@pytest.mark.parametrize("option", ["tensor_parallel", "pipeline_parallel"])
def test_a_divided_network_is_refused(tmp_path: Path, option: str) -> None:
    model = pipeline(tmp_path / "model")
    with Rank.join("cpu", tmp_path) as rank:
        cast = rank.cast(recipe(model, tmp_path / "run", backend={"name": "megatron", option: 2}))
        with pytest.raises(BackendError, match=rf"{option}.*2"):
            cast.backend()
