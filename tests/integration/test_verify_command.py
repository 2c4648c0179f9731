"""`mmrl verify` on tiny models: equal combinations are equal, planted mistakes are found and named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmrl_core.cli import main as cli

PLANTED = '''
from mmrl_core import Component, hookimpl
from mmrl_core.backends.fsdp2 import Fsdp2Backend

mmrl_api = 1
SCALED = "model.layers.1.mlp.down_proj.weight"


class Scaled(Fsdp2Backend):
    """The gradient of one parameter is a thousandth too long."""

    def setup(self, context, policy, training):
        super().setup(context, policy, training)
        parameters = {policy.weight_name(name): p for name, p in self.module.named_parameters()}
        parameters[SCALED].register_hook(lambda gradient: gradient * 1.001)


class Warm(Fsdp2Backend):
    """Replays without the sampling temperature."""

    def setup(self, context, policy, training):
        policy.sampling = policy.sampling.model_copy(update={"temperature": 1.0})
        super().setup(context, policy, training)


class Averaged(Fsdp2Backend):
    """Gradients are averaged over ranks."""

    def _backward(self, minibatch, loss):
        metrics = super()._backward(minibatch, loss)
        for parameter in self.optimizer.parameters:
            parameter.grad /= self.context.world.size
        return metrics


class Forgetful(Fsdp2Backend):
    """Every second update gets lost."""

    count = 0

    def update(self, minibatch, loss):
        self.count += 1
        if self.count % 2:
            return super().update(minibatch, loss)
        before = [p.detach().clone() for p in self.optimizer.parameters]
        metrics = super().update(minibatch, loss)
        for parameter, old in zip(self.optimizer.parameters, before):
            parameter.data.copy_(old)
        return metrics


@hookimpl
def mmrl_training_backends():
    options = "mmrl_core.backends.options:Fsdp2Options"
    return [
        Component(name=word, summary="wrong", target=f"planted_plugin:{kind}", options=options)
        for word, kind in dict(scaled="Scaled", warm="Warm", averaged="Averaged", forgetful="Forgetful").items()
    ]
'''

DRIVER = """
import json, sys, time
from mmrl_core.cli.main import main

for name, arguments in json.loads(sys.argv[1]).items():
    started = time.monotonic()
    status = main(["verify", *arguments, "--record", name])
    assert status == 0, (name, status)
    print(f"{name} took {time.monotonic() - started:.1f} s", flush=True)
"""

TEXT = {
    "base": [],
    "again": [],
    "together": ["backend.micro_batch_groups=4"],
    "shared": ['model.policy.prefix_sharing="on"'],
    "repeated": ['model.policy.prefix_sharing="off"'],
    "bf16": ["model.dtype=bfloat16"],
    "engine": ["rollout.weights=own", "rollout.dtype=bfloat16"],
    "lora": ["model.lora={rank: 4}"],
    "lora_together": ["model.lora={rank: 4}", "backend.micro_batch_groups=4"],
    "scaled": ["backend=scaled"],
    "warm": ["backend=warm"],
    "forgetful": ["backend=forgetful"],
    "two": ["launcher.processes=2", "backend.micro_batch_groups=2"],
    "averaged": ["launcher.processes=2", "backend=averaged"],
}
"""Records of the text recipe; all but the first on its batch."""

FLOW = {
    "flow": [],
    "flow_together": ["backend.micro_batch_groups=2"],
    "flow_hot": ["sampling.noise=0.31"],
}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a record of each name above, all made by one process (and the ranks it starts)."""
    from mmrl_core.testing.tiny import tiny_language_model, tiny_recipe, write_recipe_file
    from mmrl_core.testing.tiny_pipelines import tiny_pipeline

    folder = tmp_path_factory.mktemp("verify")
    site = folder / "site"
    info = site / "planted-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "planted_plugin.py").write_text(PLANTED)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mmrl]\nplanted = planted_plugin\n")
    model = tiny_language_model(folder / "model", end_tokens="abcdefghijklmnopqrstuvwxyz0123456789")
    shape = {"prompts_per_step": 5, "samples_per_prompt": 3, "kl": {"coef": 0.01}}
    reward = [{"name": "length", "run": "inline", "maximum": 1, "ramp": 5}]
    sampling = {"temperature": 0.7, "max_new_tokens": 9}
    text = tiny_recipe(model, folder / "run", algorithm=shape, rewards=reward, sampling=sampling)
    write_recipe_file(folder / "text.yaml", text)
    image = tiny_recipe(
        tiny_pipeline(folder / "sd3", "sd3"),
        folder / "run",
        model={"policy": {"name": "flow", "max_text_tokens": 24}},
        rollout="flow",
        sampling={"steps": 5, "noise": 0.3, "height": 32, "width": 32},
        data="digits",
        rewards=[{"name": "brightness", "run": "inline"}],
        algorithm={"prompts_per_step": 3, "samples_per_prompt": 2, "minibatches": 1},
        optimizer={"lr": 1e-4},
    )
    image["sampling"] = {"steps": 5, "noise": 0.3, "height": 32, "width": 32}
    write_recipe_file(folder / "image.yaml", image)
    jobs: dict[str, list[str]] = {}
    for recipe, first, variants in (("text.yaml", "base", TEXT), ("image.yaml", "flow", FLOW)):
        for name, overrides in variants.items():
            rollouts = [] if name == first else ["--rollouts", first]
            jobs[name] = [recipe, *overrides, *rollouts]
    (folder / "driver.py").write_text(textwrap.dedent(DRIVER))
    done = subprocess.run(
        [sys.executable, "driver.py", json.dumps(jobs)],
        cwd=folder,
        env=environment(site),
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def environment(site: Path) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MMRL_PLUGINS")}
    return {**clean, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


Compare = Callable[..., tuple[int, str, dict[str, Any]]]


@pytest.fixture
def compare(records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Compare:
    """`compare(first, second, *options)`: exit status, what was printed, the JSON report."""

    def run(first: str, second: str, *options: str) -> tuple[int, str, dict[str, Any]]:
        report = tmp_path / "report.json"
        folders = [str(records / first), str(records / second)]
        status = cli.main(["verify", "--compare", *folders, "--json", str(report), *options])
        captured = capsys.readouterr()
        return status, captured.out + captured.err, json.loads(report.read_text()) if report.exists() else {}

    return run


# ---------------------------------------------------------------------------------------------------------------- equal


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("base", "again"),
        ("base", "together"),
        ("shared", "repeated"),
        ("base", "two"),
        ("two", "together"),
        ("lora", "lora_together"),
        ("flow", "flow_together"),
    ],
)
def test_equal_combinations_are_equal(compare: Compare, first: str, second: str) -> None:
    status, said, report = compare(first, second)
    assert status == 0, said
    assert report["equal"]
    assert all(row["agrees"] for row in report["rows"])
    phases = {row["phase"] for row in report["rows"]}
    assert {"start weights", "log-probs", "loss", "gradients", "gradient norm", "weight change, 2 updates"} <= phases
    # Before an update the ratio is 1, and advantages of a group with as many actions a row add up to a loss of 0.
    nothing = [row["phase"] for row in report["rows"] if not row["left"] and row["phase"] != "loss"]
    assert not nothing, "comparing nothing with nothing proves nothing"


def test_the_same_twice_is_bit_equal(compare: Compare) -> None:
    _, _, report = compare("base", "again")
    assert all(row["difference"] == 0.0 for row in report["rows"] if not row["phase"].startswith("engine"))


def test_the_table_says_what_was_compared(compare: Compare) -> None:
    _, said, report = compare("base", "two")
    assert "2 ranks, 2 replicas" in said
    assert "launcher.processes: 1 -> 2" in said
    assert "5 prompts, 15 samples" in said
    assert [row["phase"] for row in report["rows"]][-1] == "log-probs, 2 updates"
    gradients = next(row for row in report["rows"] if row["phase"] == "gradients")
    assert gradients["of"] == len(gradients["details"]["parameters"]) == 20
    reference = next(row for row in report["rows"] if row["phase"] == "reference log-probs")
    assert reference["of"] == report["first"]["actions"]


def test_adapters_are_compared_with_adapters_only(compare: Compare) -> None:
    _, said, report = compare("lora", "lora_together")
    assert "of the LoRA adapters only" in said
    gradients = next(row for row in report["rows"] if row["phase"] == "gradients")
    assert all("lora" in name for name in gradients["details"]["parameters"])
    status, said, _ = compare("lora", "base")
    assert status == 2
    assert "model.lora on one side only" in said


def test_the_engine_is_held_to_what_it_declares(compare: Compare) -> None:
    status, said, report = compare("base", "engine")
    rows = {row["phase"]: row for row in report["rows"]}
    assert status == 0, said
    assert rows["engine hf (first)"]["tolerance"] == 1e-4
    second = rows["engine hf (second)"]
    assert 1e-4 < second["difference"] <= second["tolerance"] == 0.5
    assert second["details"]["metrics"]["mismatch/log_prob_diff"] > 0


# ------------------------------------------------------------------------------------------------------------ different


def test_another_precision_differs_from_the_first_phase_on(compare: Compare) -> None:
    status, said, report = compare("base", "bf16")
    assert status == 1
    assert report["first_disagreement"]["phase"] == "log-probs"
    assert "first disagreement: log-probs: sample 0 (prompt 0), action 0" in said
    assert compare("base", "bf16", "--tolerance", "bfloat16")[0] == 0, said


def test_one_scaled_gradient_is_named(compare: Compare) -> None:
    status, said, report = compare("scaled", "base")
    first = report["first_disagreement"]
    assert status == 1
    assert (first["phase"], first["what"]) == ("gradients", "model.layers.1.mlp.down_proj.weight")
    assert first["difference"] == pytest.approx(1e-3, rel=1e-2)
    assert first["left"] == pytest.approx(1.001 * first["right"], rel=1e-5)
    assert "1 of 20 parameters differ" in said
    assert report["hint"] == ""


def test_a_forgotten_temperature_is_found_in_the_log_probs(compare: Compare, records: Path) -> None:
    from safetensors.torch import load_file

    status, said, report = compare("warm", "base")
    first = report["first_disagreement"]
    assert status == 1
    assert (first["phase"], first["what"]) == ("log-probs", "sample 0 (prompt 0), action 0"), said
    right = load_file(records / "base" / "numbers.safetensors")["log_probs"]
    assert first["right"] == pytest.approx(float(right[0, 0]))
    assert not next(row for row in report["rows"] if row["phase"] == "gradients")["agrees"]


def test_an_average_over_ranks_is_called_by_its_name(compare: Compare) -> None:
    status, said, report = compare("averaged", "base")
    assert status == 1
    assert report["first_disagreement"]["phase"] == "gradients"
    assert "every gradient of the first is 0.5 times the second's: one of them averages over 2 ranks" in said
    assert [row["agrees"] for row in report["rows"] if row["phase"] in ("log-probs", "entropy", "loss")] == [True] * 3


def test_a_lost_update_shows_in_the_weights(compare: Compare) -> None:
    _, said, report = compare("forgetful", "base")
    assert report["first_disagreement"]["phase"] == "weight change, 2 updates", said


def test_other_noise_in_denoising_is_found(compare: Compare) -> None:
    status, _, report = compare("flow_hot", "flow")
    assert status == 1
    assert report["first_disagreement"]["phase"] == "log-probs"


# ---------------------------------------------------------------------------------------------------------- the command


def test_both_in_one_command(records: Path) -> None:
    """The exit status and stdout of what users type; each combination in a process of its own."""
    command = [sys.executable, "-m", "mmrl_core.cli.main", "verify", "text.yaml", "--prompts", "2", "--folder", "both"]
    command += ["--updates", "2"]
    done = subprocess.run(
        [*command, "--synthetic-advantages", "--against", "backend=scaled", "backend.micro_batch_groups=2"],
        cwd=records,
        env=environment(records / "site"),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.startswith("first ")
    assert "first disagreement: gradients: model.layers.1.mlp.down_proj.weight" in done.stdout
    assert "2 prompts, 6 samples" in done.stdout
    assert "log-probs, 4 updates" in done.stdout
    assert "advantages from fixed numbers" in done.stdout
    assert "recording second: backend=scaled backend.micro_batch_groups=2" in done.stderr


def test_records_of_different_batches_are_refused(compare: Compare) -> None:
    status, said, _ = compare("base", "flow")
    assert status == 2
    assert "different batches" in said
