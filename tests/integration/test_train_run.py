"""Whole runs: what a run leaves behind, on 1 and 2 ranks, and through every algorithmic option."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch

from mmrl_core.metrics.names import COLOCATED_SUM, is_volatile, reproducible
from mmrl_core.recipe import load_recipe

SEEDS_NAMES = [
    "timing/all", "timing/update", "timing/rollout", "timing/old_log_p", "timing/reference_model",
    "timing/resharding_to_train", "timing/resharding_to_infer", "timing/adv", "timing/non_overlap_reference_model",
    "timing/non_overlap_adv", "timing/ref_onload", "timing/ref_offload", "actor/entropy", "actor/pg_loss",
    "actor/pg_clipfrac", "actor/ppo_kl", "grad_norm", "grpo/lr", "grpo/score/mean", "grpo/score/max", "grpo/score/min",
    "grpo/rewards/mean", "grpo/rewards/max", "grpo/rewards/min", "response_length/mean", "response_length/min",
    "response_length/max", "prompt_length/mean", "prompt_length/min", "prompt_length/max", "e2e_tps", "update_tps",
    "vllm_tps",
]  # fmt: skip


ORDINARY = [
    "checkpoint.every=2",
    "eval.data={name: arithmetic, largest: 9, split: test}",
    "eval.prompts=10",
    "eval.every=2",
    "eval.first=true",
    "writers=[{name: console, samples: 100}, jsonl, tensorboard]",
    "show_samples=11",
]


@pytest.fixture(scope="module")
def finished(shared_workshop):
    """One ordinary run with periodic checkpoints and evaluation."""
    return shared_workshop, shared_workshop.train("one", *ORDINARY)


def test_the_run_folder_holds_everything(finished) -> None:
    workshop, done = finished
    folder = workshop.folder / "one"
    assert {"recipe.yaml", "run.log", "metrics.jsonl", "summary.json", "progress.png"} <= {
        p.name for p in folder.iterdir()
    }
    assert list((folder / "tensorboard").glob("events*"))
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step_00000002", "step_00000004"]
    assert (folder / "progress.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["outcome"] == "finished"
    assert summary["steps"] == 4
    assert "step 4/4" in done.out
    assert "before training" in done.out
    rows = workshop.metrics("one")
    assert summary["eval"]["score"] == rows[-1]["eval/score/mean"]
    assert summary["eval"]["rewards"] == {n: rows[-1][f"eval/reward/{n}/mean"] for n in ("numeric", "length")}
    for found in (summary["eval"], summary["eval"]["first"]):
        assert found["prompts"] == 10
        assert found["score"] == pytest.approx(found["rewards"]["numeric"] + 0.5 * found["rewards"]["length"])
    recipe, _ = load_recipe(folder / "recipe.yaml")
    assert recipe.algorithm.steps == 4


def test_as_many_samples_are_shown_as_asked_for_with_their_scores(finished) -> None:
    workshop, done = finished
    shown = [float(score) for score in re.findall(r"^  score: '(\S+)'$", done.out, re.MULTILINE)]
    assert len(shown) == 11
    row = workshop.metrics("one")[-1]
    hidden = 12 * row["grpo/score/mean"] - sum(shown)
    assert row["grpo/score/min"] - 1e-3 <= hidden <= row["grpo/score/max"] + 1e-3, "of the twelve in the step"
    assert min(hidden, *shown) == pytest.approx(row["grpo/score/min"], abs=1e-3)


def test_every_metric_of_the_table_is_there_and_the_times_add_up(finished) -> None:
    workshop, _ = finished
    rows = workshop.metrics("one")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        missing = [name for name in SEEDS_NAMES if name not in row]
        assert not missing
        assert row["timing/all"] >= sum(row[f"timing/{name}"] for name in COLOCATED_SUM)
        assert row["e2e_tps"] == pytest.approx(
            (row["prompt_length/mean"] + row["response_length/mean"]) * 12 / row["timing/all"]
        )
        assert row["perf/samples_per_second"] == pytest.approx(12 / row["timing/all"])
        assert row["grpo/score/mean"] == pytest.approx(
            row["reward/numeric/mean"] + 0.5 * row["reward/length/mean"], abs=1e-9
        )
    assert "eval/score/mean" in rows[1]
    assert "eval/score/mean" not in rows[0]


def test_before_the_first_update_engine_and_replay_agree(finished) -> None:
    workshop, _ = finished
    for row in workshop.metrics("one"):
        assert row["mismatch/log_prob_diff_max"] < 1e-4
        assert row["actor/ppo_kl"] == 0.0
        assert row["actor/pg_clipfrac"] == 0.0


def test_the_export_is_an_ordinary_folder(finished) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    workshop, _ = finished
    folder = workshop.folder / "one" / "export"
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert AutoTokenizer.from_pretrained(folder).chat_template
    before = AutoModelForCausalLM.from_pretrained(workshop.model)
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, before.get_parameter(n))]
    assert len(changed) == len(list(model.named_parameters()))


def test_export_command_writes_the_same_weights(finished) -> None:
    workshop, _ = finished
    done = workshop.mmrl("export", "one", "again")
    assert done.status == 0, done.all
    from safetensors.torch import load_file

    again = load_file(workshop.folder / "again" / "model.safetensors")
    first = workshop.weights("one")
    assert again.keys() == first.keys()
    assert all(torch.equal(again[n], first[n]) for n in first)
    refused = workshop.mmrl("export", "one", "again")
    assert refused.status != 0
    assert "exists" in refused.err


def test_evaluation_of_folders_shows_each_reward(finished) -> None:
    workshop, _ = finished
    options = ["eval.data={name: arithmetic, largest: 9, split: test}", "eval.prompts=10", "run_dir=one"]
    done = workshop.mmrl("eval", str(workshop.recipe), *options, "--output", "eval.json")
    assert done.status == 0, done.all
    report = json.loads((workshop.folder / "eval.json").read_text())
    summary = json.loads((workshop.folder / "one" / "summary.json").read_text())["eval"]
    for model, found in zip(report["models"], (summary["first"], summary), strict=True):
        assert model["score"] == pytest.approx(found["score"])
        assert model["rewards"] == pytest.approx(found["rewards"])
        assert f"numeric {model['rewards']['numeric']:.4f}  length {model['rewards']['length']:.4f}" in done.out


def test_a_finished_run_is_left_alone(finished) -> None:
    workshop, _ = finished
    before = (workshop.folder / "one" / "metrics.jsonl").read_bytes()
    done = workshop.train("one", "checkpoint.every=2")
    assert "nothing to do" in done.out
    assert (workshop.folder / "one" / "metrics.jsonl").read_bytes() == before


def test_a_run_that_died_after_its_last_step_is_ended(finished) -> None:
    workshop, _ = finished
    folder = workshop.folder / "one"
    rows, weights = (folder / "metrics.jsonl").read_bytes(), workshop.weights("one")
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").unlink()  # what a kill between the last checkpoint and the export leaves
    shutil.rmtree(folder / "export")
    done = workshop.train("one", *ORDINARY)
    assert "resuming after step 4" in done.out
    again = workshop.weights("one")
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    assert (folder / "metrics.jsonl").read_bytes() == rows
    ended = json.loads((folder / "summary.json").read_text())
    for name in ("outcome", "steps", "first_reward", "last_reward", "export", "checkpoint"):
        assert ended[name] == summary[name], name
    assert ended["eval"]["rewards"] == summary["eval"]["rewards"]
    assert "nothing to do" in workshop.train("one", *ORDINARY).out


def test_two_ranks_learn_what_one_learns(finished) -> None:
    workshop, _ = finished
    options = ["algorithm.prompts_per_step=3", "algorithm.minibatches=2", "algorithm.steps=3"]
    workshop.train("single", *options)
    workshop.train("double", *options, "launcher.processes=2", "launcher.name=local")
    one, two = workshop.metrics("single"), workshop.metrics("double")
    for a, b in zip(one, two, strict=True):
        names = {n for n in a if not is_volatile(n)}
        assert names == {n for n in b if not is_volatile(n)}
        for name in names:
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=2e-5), (a["step"], name)
    weights, other = workshop.weights("single"), workshop.weights("double")
    for name, tensor in weights.items():
        assert torch.allclose(tensor, other[name], rtol=1e-4, atol=1e-5), name


def test_minibatches_of_samples_do_not_depend_on_ranks(shared_workshop) -> None:
    """Fewer prompts than ranks in the first step: one rank has a spare row only, and it counts nothing."""
    options = ["algorithm.prompts_per_step=1", "algorithm.minibatches=2", "algorithm.minibatch_split=samples"]
    options += ["algorithm.steps=3", "algorithm.kl.coef=0.1", "backend.micro_batch_samples=2"]
    shared_workshop.train("samples1", *options)
    shared_workshop.train("samples2", *options, "launcher.processes=2", "launcher.name=local")
    one, two = shared_workshop.metrics("samples1"), shared_workshop.metrics("samples2")
    for a, b in zip(one, two, strict=True):
        assert a["policy_version"] == 2.0 * (a["step"] - 1)
        for name in (n for n in a if not is_volatile(n)):
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=2e-5), (a["step"], name)
    weights, other = shared_workshop.weights("samples1"), shared_workshop.weights("samples2")
    assert all(torch.allclose(t, other[n], rtol=1e-4, atol=1e-5) for n, t in weights.items())


def test_a_resumed_run_evaluates_before_training_once(shared_workshop) -> None:
    options = ["eval.data={name: arithmetic, largest: 9, split: test}", "eval.prompts=4", "eval.every=2"]
    options += ["eval.first=true", "writers=[console]", "checkpoint.export=false"]
    first = shared_workshop.train("halves", *options, "algorithm.steps=1", "checkpoint.every=1")
    assert "before training" in first.out
    before = json.loads((shared_workshop.folder / "halves" / "summary.json").read_text())["eval"]
    second = shared_workshop.train("halves", *options, "algorithm.steps=2")
    assert "before training" not in second.out
    after = json.loads((shared_workshop.folder / "halves" / "summary.json").read_text())["eval"]
    assert after["first"] == before["first"]
    assert before["score"] is not None


def test_torchrun_is_the_local_launcher_bit_for_bit(shared_workshop) -> None:
    options = ["algorithm.steps=2", "algorithm.minibatches=2"]
    shared_workshop.train("local2", *options, "launcher={name: local, processes: 2}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "mmrl_core.cli.main", "train", str(shared_workshop.recipe), "run_dir=torchrun2", *options],
        cwd=shared_workshop.folder,
        env=shared_workshop.environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    a, b = shared_workshop.metrics("local2"), shared_workshop.metrics("torchrun2")
    assert [reproducible(row) for row in a] == [reproducible(row) for row in b]
    one, two = shared_workshop.weights("local2"), shared_workshop.weights("torchrun2")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    "overrides",
    [
        [
            "algorithm.advantage.name=dr_grpo",
            "algorithm.loss.aggregation=seq-mean-token-sum-norm",
            "deterministic=true",
        ],
        ["algorithm.advantage.name=rloo", "algorithm.kl={coef: 0.1, where: reward, estimator: k1}"],
        ["algorithm.advantage.name=global_std", "algorithm.kl={coef: 0.1}", "algorithm.minibatches=3"],
        ["algorithm.loss.name=gspo", "algorithm.epochs=2", "algorithm.loss.clip_low=3e-4"],
        ["algorithm.dynamic_sampling={max_rounds: 3}", "algorithm.loss={clip_high: 0.28, dual_clip: 3}"],
        ["algorithm.importance={level: sequence, mode: mask, cap: 2}", "algorithm.loss.entropy_coef=0.01"],
        ["model.lora={rank: 4}", "algorithm.kl={coef: 0.05}", "algorithm.epochs=2"],
        ["rollout.weights=own", "backend.activation_checkpointing=true", "algorithm.truncated=mask"],
        ["model.dtype=bfloat16", "algorithm.importance={level: token}", "algorithm.old_log_probs=recompute"],
        [
            "algorithm.minibatch_split=samples",
            "algorithm.minibatches=4",
            "algorithm.prompts_per_step=1",
            "backend.micro_batch_samples=3",
        ],
        [
            "algorithm.advantage={combine: advantages, clamp: 3}",
            "algorithm.dynamic_sampling={max_rounds: 2}",
            "algorithm.shuffle_rewards=true",
            "rewards.2={name: length, label: watched, run: inline, maximum: 3, ramp: 2, weight: 0}",
        ],
        ["algorithm.truncated=drop", "sampling.top_p=0.9", "sampling.top_k=20", "algorithm.old_log_probs=behaviour"],
    ],
    ids=lambda o: o[0].split("=")[0] + "=" + o[0].split("=", 1)[1][:16],
)
def test_every_option_runs(shared_workshop, overrides: list[str], request: pytest.FixtureRequest) -> None:
    run = f"option-{request.node.callspec.id}".replace(" ", "").replace("{", "").replace(":", "-")
    shared_workshop.train(run, "algorithm.steps=2", *overrides)
    rows = shared_workshop.metrics(run)
    assert len(rows) == 2
    for row in rows:
        assert all(math.isfinite(v) for v in row.values() if v is not None), row
    if any("kl=" in o and "where" not in o for o in overrides):
        assert rows[-1]["actor/kl_loss"] > 0
        assert rows[-1]["timing/reference_model"] > 0
