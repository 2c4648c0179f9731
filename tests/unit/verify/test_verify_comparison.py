"""Comparing records that are written by hand: what differs, where first, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mmrl_core.cli import main as cli
from mmrl_core.cli import verify as command
from mmrl_core.errors import VerifyError
from mmrl_core.verify.compare import compare
from mmrl_core.verify.job import FORMAT, Job
from mmrl_core.verify.report import as_json, table
from mmrl_core.verify.tolerances import BY_DTYPE, tolerances

NAMES = ["embed", "layers.2.up", "layers.10.down", "head"]
"""Not in alphabetical order: the forward pass has an order of its own."""


def tensors(seed: int, size: float = 1.0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: size * torch.randn(6, 5, generator=draw) for name in NAMES}


class Sheet:
    """A record that can be changed before it is written."""

    def __init__(self) -> None:
        mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]], dtype=torch.bool)
        values = torch.where(mask, -torch.rand(mask.shape, generator=torch.Generator().manual_seed(5)) - 2, 0.0)
        self.numbers = {"mask": mask, "log_probs": values, "entropy": -values, "log_probs.1": values + 0.1 * mask}
        self.streams = {"start": tensors(1), "gradients": tensors(2, 1e-3), "change-0001": tensors(3, 1e-3)}
        update = {"loss": 0.25, "grad_norm": 3.5}
        self.facts: dict[str, Any] = {
            "format": FORMAT,
            "combination": {
                "device": {"name": "cpu"},
                "backend": {"name": "fsdp2"},
                "rollout": {"name": "hf"},
                "sampling": {"temperature": 1.0},
            },
            "dtype": "float32",
            "weights": "float32",
            "form": "merged",
            "world": 1,
            "replicas": 1,
            "versions": {"torch": "2"},
            "batch": "abc",
            "samples": 4,
            "groups": 2,
            "actions": int(mask.sum()),
            "advantages": "rewards",
            "rows": [{"sample": 10 + row, "group": row // 2} for row in range(4)],
            "steps": 1,
            "names": dict.fromkeys(self.streams, NAMES),
            "updates": [dict(update), dict(update)],
            "engine": None,
        }

    def write(self, folder: Path) -> Path:
        folder.mkdir()
        (folder / "verify.json").write_text("{}")
        save_file(self.numbers, folder / "numbers.safetensors")
        for name, stream in self.streams.items():
            (folder / name).mkdir()
            save_file(stream, folder / name / "weights.safetensors")
        (folder / "record.json").write_text(json.dumps(self.facts))
        return folder


Change = Callable[[Sheet], None]


@pytest.fixture
def compared(tmp_path: Path) -> Callable[..., Any]:
    def run(change: Change | None = None, both: Change | None = None, *changes: str) -> Any:
        folders = []
        for name in ("a", "b"):
            sheet = Sheet()
            if both is not None:
                both(sheet)
            if change is not None and name == "a":
                change(sheet)
            folders.append(sheet.write(tmp_path / name))
        return compare(*folders, changes)

    return run


def test_equal_records(compared: Callable[..., Any]) -> None:
    comparison = compared()
    assert comparison.first is None
    assert [row.difference for row in comparison.rows] == [0.0] * len(comparison.rows)
    assert "equal: 9 comparisons" in table(comparison)
    assert json.loads(json.dumps(as_json(comparison)))["equal"] is True


def test_the_first_phase_is_named_even_when_later_ones_differ_more(compared: Callable[..., Any]) -> None:
    def change(sheet: Sheet) -> None:
        sheet.numbers["entropy"][1, 1] += 1e-4
        sheet.numbers["entropy"][3, 0] += 1.0
        sheet.streams["gradients"]["embed"] *= 2

    first = compared(change).first
    assert (first.phase, first.place.what, first.beyond) == ("entropy", "sample 11 (prompt 0), action 1", 2)


def test_rounded_weights_are_compared_with_rounded_ones(compared: Callable[..., Any]) -> None:
    """One backend exports fp32 weights, the other the bf16 ones that it computes with."""

    def both(sheet: Sheet) -> None:
        sheet.facts["dtype"] = "bfloat16"

    def rounded(sheet: Sheet) -> None:
        sheet.facts["weights"] = "bfloat16"
        start, change = sheet.streams["start"], sheet.streams["change-0001"]
        for name in NAMES:
            after = (start[name] + change[name]).bfloat16().float()
            start[name] = start[name].bfloat16().float()
            change[name] = after - start[name]

    comparison = compared(rounded, both)
    assert comparison.first is None
    change = next(row for row in comparison.rows if row.phase.startswith("weight change"))
    assert change.difference > 0.5, "a change of 1e-3 is below half a unit in the last place of most of these weights"


def test_rounding_excuses_no_other_weights(compared: Callable[..., Any]) -> None:
    def other(sheet: Sheet) -> None:
        sheet.facts["weights"] = "bfloat16"
        sheet.streams["start"]["embed"][0, 0] *= 1.02

    assert compared(other).first.place.what == "embed"


def test_log_probs_outside_the_mask_do_not_count(compared: Callable[..., Any]) -> None:
    def change(sheet: Sheet) -> None:
        sheet.numbers["log_probs"][1, 2] = 7.0

    assert compared(change).first is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_never_equal(compared: Callable[..., Any], value: float) -> None:
    def both(sheet: Sheet) -> None:
        sheet.numbers["log_probs"][0, 1] = value
        sheet.streams["gradients"]["head"][0, 0] = value
        sheet.facts["updates"][0]["loss"] = value

    comparison = compared(None, both)
    assert [row.phase for row in comparison.rows if not row.agrees] == ["log-probs", "loss", "gradients"]
    assert json.loads(json.dumps(as_json(comparison), allow_nan=False))["equal"] is False


def test_the_first_gradient_is_the_one_next_to_the_loss(compared: Callable[..., Any]) -> None:
    def change(sheet: Sheet) -> None:
        for name in ("embed", "layers.2.up", "layers.10.down"):
            sheet.streams["gradients"][name] *= 1.001

    comparison = compared(change)
    assert comparison.first.phase == "gradients"
    assert comparison.first.place.what == "layers.10.down"
    assert comparison.first.place.difference == pytest.approx(1e-3, rel=1e-4)
    assert (comparison.first.beyond, comparison.first.of) == (3, 4)
    assert "first disagreement: gradients: layers.10.down" in table(comparison)


def test_the_first_start_weight_is_the_one_next_to_the_input(compared: Callable[..., Any]) -> None:
    def change(sheet: Sheet) -> None:
        for name in ("layers.2.up", "head"):
            sheet.streams["start"][name][0, 0] += 1e-7

    first = compared(change).first
    assert (first.phase, first.place.what) == ("start weights", "layers.2.up")


def test_a_gradient_that_cancels_out_is_not_held_to_its_own_rounding(compared: Callable[..., Any]) -> None:
    def both(sheet: Sheet) -> None:
        sheet.streams["gradients"]["head"] *= 1e-9

    def noise(sheet: Sheet) -> None:
        sheet.streams["gradients"]["head"] *= -1

    assert compared(noise, both).first is None


@pytest.mark.parametrize(("factor", "said"), [(0.5, "averages over 2 ranks"), (4.0, "averages over 4 ranks")])
def test_a_common_factor_is_explained(compared: Callable[..., Any], factor: float, said: str) -> None:
    def both(sheet: Sheet) -> None:
        sheet.facts["replicas"], sheet.facts["world"] = 2, 4

    def change(sheet: Sheet) -> None:
        for tensor in sheet.streams["gradients"].values():
            tensor *= factor

    assert said in compared(change, both).hint


def test_directions_that_differ_are_no_common_factor(compared: Callable[..., Any]) -> None:
    def change(sheet: Sheet) -> None:
        for tensor in sheet.streams["gradients"].values():
            tensor[0] *= -1

    assert compared(change).hint == ""


def test_elements_that_adam_moves_by_rounding_alone_are_left_out(compared: Callable[..., Any]) -> None:
    def both(sheet: Sheet) -> None:
        sheet.streams["gradients"]["head"][2, 2] = 1e-9

    def change(sheet: Sheet) -> None:
        sheet.streams["change-0001"]["head"][2, 2] *= -1

    assert compared(change, both).first is None


def test_any_other_element_is_not(compared: Callable[..., Any]) -> None:
    def change(sheet: Sheet) -> None:
        sheet.streams["change-0001"]["head"][2, 2] *= 1.01

    first = compared(change).first
    assert (first.phase, first.place.what) == ("weight change, 2 updates", "head")
    assert "[2, 2]" in first.place.note


def test_weights_cannot_differ_by_less_than_their_rounding(compared: Callable[..., Any]) -> None:
    def both(sheet: Sheet) -> None:
        for tensor in sheet.streams["change-0001"].values():
            tensor *= 1e-3  # 1e-6, of weights around 1

    def change(sheet: Sheet) -> None:
        sheet.streams["change-0001"]["head"] += 2.0**-25

    comparison = compared(change, both)
    row = next(row for row in comparison.rows if row.phase.startswith("weight change"))
    assert row.agrees
    assert row.difference > 1e-3
    assert row.tolerance > 1e-2


def test_a_parameter_that_only_one_has(compared: Callable[..., Any]) -> None:
    def change(sheet: Sheet) -> None:
        sheet.streams["gradients"]["extra"] = sheet.streams["gradients"].pop("head")
        sheet.facts["names"]["gradients"] = [*NAMES[:3], "extra"]

    first = compared(change).first
    assert (first.phase, first.place.what, first.place.note) == ("gradients", "extra", "only the first has it")


def test_other_shapes(compared: Callable[..., Any]) -> None:
    def change(sheet: Sheet) -> None:
        sheet.streams["start"]["embed"] = torch.zeros(7, 5)

    assert compared(change).first.place.note == "shapes [7, 5] and [6, 5]"


def test_an_engine_beyond_what_it_declares(compared: Callable[..., Any]) -> None:
    def change(sheet: Sheet) -> None:
        sheet.facts["engine"] = {
            "name": "dice",
            "temperature_applied": True,
            "truncation_renormalised": False,
            "tolerance": 1e-4,
            "metrics": {"mismatch/log_prob_diff_max": 0.3},
            "place": {"sample": 12, "group": 1, "action": 0, "engine": -1.0, "training": -1.3},
        }

    first = compared(change).first
    assert first.phase == "engine dice (first)"
    assert (first.place.left, first.place.right, first.place.tolerance) == (-1.0, -1.3, 1e-4)


def test_an_engine_whose_log_probs_mean_something_else_is_not_judged(compared: Callable[..., Any]) -> None:
    def change(sheet: Sheet) -> None:
        sheet.facts["engine"] = {
            "name": "dice",
            "temperature_applied": True,
            "truncation_renormalised": True,
            "tolerance": 1e-4,
            "metrics": {"mismatch/log_prob_diff_max": 0.3},
            "place": {"sample": 12, "group": 1, "action": 0, "engine": -1.0, "training": -1.3},
        }

    comparison = compared(change)
    assert comparison.first is None
    assert "not compared: they are of the truncated distribution" in table(comparison)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.facts.update(batch="other"), "different batches"),
        (lambda s: s.facts.update(steps=2), "--updates"),
        (lambda s: s.facts.update(form="adapter"), "model.lora"),
        (lambda s: s.facts.update(format=99), "another version of mmrl"),
    ],
)
def test_records_that_do_not_belong_together(compared: Callable[..., Any], change: Change, said: str) -> None:
    with pytest.raises(VerifyError, match=said):
        compared(change)


@pytest.mark.parametrize(
    ("file", "said"),
    [("record.json", "was not finished"), ("numbers.safetensors", "damaged"), ("gradients/weights.safetensors", "dam")],
)
def test_a_damaged_record(tmp_path: Path, file: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = Sheet().write(tmp_path / "a"), Sheet().write(tmp_path / "b")
    if file.endswith("json"):
        (b / file).unlink()
    else:
        (b / file).write_bytes((b / file).read_bytes()[:100])
    assert cli.main(["verify", "--compare", str(a), str(b)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [(["logprobs=1"], "Did you mean 'log_probs'"), (["float3"], "float32"), (["loss=x"], "no number"),
     (["loss=-1"], "no number")],
)  # fmt: skip
def test_unknown_tolerances(changes: list[str], said: str) -> None:
    with pytest.raises(VerifyError, match=said):
        tolerances(["float32", "float32"], changes)


def test_the_more_precise_dtype_sets_the_tolerances() -> None:
    assert tolerances(["bfloat16", "float32"], []) == ("float32", BY_DTYPE["float32"])
    assert tolerances(["bfloat16", "float32"], ["bfloat16"])[1] == BY_DTYPE["bfloat16"]
    word, deep = tolerances(["float32", "float32"], ["loss=3"], 300)
    assert word == "float32 for a deep network"
    assert (deep.loss, deep.log_probs, deep.after) == (3.0, pytest.approx(2e-5), 1e-4)


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    job = Job(prompts=1, steps=1, rollouts=None, synthetic_advantages=False)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(VerifyError, match="not empty"):
        job.prepare(tmp_path)
    assert (tmp_path / "thesis.txt").exists()
    job.prepare(tmp_path / "new")
    (tmp_path / "new" / "record.json").write_text("{}")
    job.prepare(tmp_path / "new")
    assert Job.read(tmp_path / "new") == job
    assert not (tmp_path / "new" / "record.json").exists()


RECIPE = {
    "run_dir": "run",
    "device": "cpu",
    "model": {"path": "some/model"},
    "data": "arithmetic",
    "rewards": ["exact"],
    "algorithm": {"steps": 1, "prompts_per_step": 2, "samples_per_prompt": 2},
}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    (tmp_path / "r.yaml").write_text(json.dumps(RECIPE))
    return "r.yaml"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{r}"], "one of --against, --record and --compare"),
        (["{r}", "--against", "seed=1", "--record", "x"], "one of --against"),
        (["{r}", "--compare", "a", "b"], "no recipe"),
        (["--against", "{r}"], "needs a recipe"),
        (["--record", "x"], "needs a recipe"),
        (["{r}", "--against", "seed"], "takes overrides"),
        (["{r}", "--against", "backend=fsdp3"], "fsdp3"),
        (["{r}", "nosuch=1", "--against"], "nosuch"),
        (["{r}", "--record", "x", "--rollouts", "x"], "would replace"),
        (["{r}", "--record", "x", "--rollouts", "y"], "holds no batch"),
        (["--compare", "nowhere", "there"], "no record"),
    ],
)
def test_wrong_words_have_status_2(
    recipe: str, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert cli.main(["verify", *(a.format(r=recipe) for a in arguments)]) == 2
    assert said in capsys.readouterr().err
    assert not Path("run").exists()


def test_both_at_once_under_another_launcher_is_refused(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["verify", recipe, "--against"]) == 2
    assert "--record FOLDER" in capsys.readouterr().err


def test_a_combination_that_fails_has_status_2(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Done:
        returncode = 1

    monkeypatch.setattr(command.subprocess, "run", lambda *a, **k: Done())
    assert cli.main(["verify", recipe, "--against", "seed=1"]) == 2
    assert "the first combination" in capsys.readouterr().err


def test_a_bug_does_not_look_like_a_difference(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> int:
        raise ValueError("a bug")

    monkeypatch.setattr(command, "_compare", broken)
    assert cli.main(["verify", "--compare", "a", "b"]) == 2
    assert "ValueError: a bug" in capsys.readouterr().err
