"""Saving and loading across layouts, with four gloo processes; what is written is read back by torch's own reader."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from mmrl_mindspeed import box_planners
from mmrl_mindspeed.segments import Box
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from mmrl_core.checkpoint.formats import open_weights
from mmrl_core.checkpoint.matching import Wanted
from mmrl_core.errors import CheckpointError
from mmrl_core.testing.stage import run_ranks
from mmrl_core.testing.tiny import tiny_language_model, tiny_recipe

WRITER = {"tensor_parallel": 2, "pipeline_parallel": 2}
OTHERS: Mapping[str, Mapping[str, Any]] = {
    "tp2-sp-dp2": {"tensor_parallel": 2, "sequence_parallel": True},
    "pp2-dp2": {"pipeline_parallel": 2},
    "dp4": {},
    "dp4-undivided": {"distributed_optimizer": False},
}
CASES = {"fp32": ("llama", "float32", list(OTHERS)), "bf16": ("qwen2", "bfloat16", ["pp2-dp2", "dp4-undivided"])}
"""Architecture, precision, layouts. The Llama has tied embeddings and both have a vocabulary that 2 does not divide."""
PAIRS = [(case, name) for case, (_, _, names) in CASES.items() for name in names]


def scenes(folder: Path, case: str) -> list[dict[str, Any]]:
    architecture, dtype, others = CASES[case]
    tied = architecture == "llama"
    model = tiny_language_model(folder / case, architecture=architecture, tie_word_embeddings=tied, extra_vocabulary=3)

    def scene(name: str, options: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
        recipe = tiny_recipe(
            model,
            folder / "run",
            model={"dtype": dtype},
            backend={"name": "megatron", **options},
            optimizer={"lr": 1e-2, "eps": 1e-6, "weight_decay": 0.1},
        )
        places = {key: f"{case}-{fields[key]}" for key in ("load", "save") if key in fields}
        return {"name": f"{case}-{name}", "recipe": recipe, **fields, **places}

    return [
        scene("writer", WRITER, updates=2, save="saved", then=1),
        scene("twin", WRITER, load="saved", then=1),
        *(scene(name, OTHERS[name], load="saved", save=f"saved-{name}", then=1) for name in others),
    ] + [
        scene("light", WRITER, updates=1, save="saved-light", optimizer=False),
        scene("refused", WRITER, load="saved-light", error=True),
        scene("fresh", {}, load="saved-light", optimizer=False),
        scene("foreign", {}, load="nothing", error=True),
    ] * (case == "fp32")


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what every scene wrote."""
    folder = tmp_path_factory.mktemp("scenes")
    plan = [scene for case in CASES for scene in scenes(folder, case)]
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    run_ranks("checkpoint_ranks", [str(folder)], 4, folder, timeout_s=500)
    return folder


def seen(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / f"{name}.pt", weights_only=True)
    return found


def equal(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def stored(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    dcp_to_torch_save(folder, folder.with_suffix(".flat"))
    found: dict[str, dict[str, torch.Tensor]] = torch.load(folder.with_suffix(".flat"), weights_only=True)
    return found


@pytest.mark.parametrize("case", CASES)
def test_same_layout_goes_on_bit_equal(played: Path, case: str) -> None:
    writer, twin = seen(played, f"{case}-writer"), seen(played, f"{case}-twin")
    assert equal(writer["saved"], twin["loaded"])
    assert equal(writer["weights"], twin["weights"])
    assert not equal(writer["saved"], writer["weights"])
    assert torch.equal(writer["log_probs"], twin["log_probs"])
    assert writer["metrics"] == twin["metrics"]


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_other_layout_has_the_same_state_and_goes_on_alike(played: Path, case: str, name: str) -> None:
    writer, other = seen(played, f"{case}-writer"), seen(played, f"{case}-{name}")
    assert equal(writer["saved"], other["loaded"])
    # fp32 weights and moments, written by one layout and written again by the other
    first, second = stored(played / f"{case}-saved"), stored(played / f"{case}-saved-{name}")
    for kind in ("model", "exp_avg", "exp_avg_sq"):
        assert equal(first[kind], second[kind]), kind
    tolerance = 1e-5 if case == "fp32" else 0.1  # of log-probs down to -10, after one more update
    torch.testing.assert_close(other["log_probs"], writer["log_probs"], atol=tolerance, rtol=0)
    assert other["metrics"]["actor/lr"] == writer["metrics"]["actor/lr"]


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_readable_by_others(played: Path, case: str) -> None:
    state, exported = stored(played / f"{case}-saved"), seen(played, f"{case}-writer")["saved"]
    assert {name: t.shape for name, t in state["model"].items()} == {n: t.shape for n, t in exported.items()}
    for name, tensor in state["model"].items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor.to(exported[name].dtype), exported[name]), name
        assert bool(state["exp_avg_sq"][name].ge(0).all())
    assert any(bool(t.ne(0).any()) for t in state["exp_avg"].values())
    wanted = [Wanted(names=(name,), shape=tuple(t.shape)) for name, t in exported.items()]
    source = open_weights(played / f"{case}-saved", wanted=wanted)  # as model.init_from does
    assert all(torch.equal(source.read(name), state["model"][name]) for name in exported)
    assert case == "fp32" or any(not torch.equal(t, t.bfloat16().float()) for t in state["model"].values())


def test_without_an_optimizer(played: Path) -> None:
    assert "load_optimizer: false" in seen(played, "fp32-refused")["error"]
    assert set(stored(played / "fp32-saved-light")) == {"model", "random"}
    assert equal(seen(played, "fp32-light")["saved"], seen(played, "fp32-fresh")["loaded"])
    assert "megatron did not write this checkpoint" in seen(played, "fp32-foreign")["error"]


def test_a_checkpoint_of_another_model_is_refused(played: Path) -> None:
    def wanted(key: str, *shape: int) -> Mapping[str, Sequence[Box]]:
        return {key: [Box(name=key, shape=shape, offsets=(0,) * len(shape), memory=torch.zeros(shape))]}

    with pytest.raises(CheckpointError, match=r"no tensor 'model.model.layers.9.*of another model"):
        box_planners.load(played / "fp32-saved", wanted("model.model.layers.9.mlp.up_proj.weight", 2, 2))
    with pytest.raises(CheckpointError, match=r"has shape \(\d+,\), and this model's is \(3,\)"):
        box_planners.load(played / "fp32-saved", wanted("model.model.norm.weight", 3))
