"""Stopping at any instant and going on: the result is the undisturbed run's, bit for bit."""

from __future__ import annotations

import random
import signal
import subprocess
import time

import psutil
import pytest
import torch

from mmrl_core.metrics.names import reproducible

STEPS = 8
OPTIONS = [f"algorithm.steps={STEPS}", "checkpoint.every=1", "algorithm.minibatches=2", "algorithm.epochs=2"]


@pytest.fixture(scope="module")
def undisturbed(shared_workshop):
    shared_workshop.train("undisturbed", *OPTIONS)
    return shared_workshop


def start(workshop, run: str, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        workshop.command("train", str(workshop.recipe), f"run_dir={run}", *OPTIONS, *options),
        cwd=workshop.folder,
        env=workshop.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"the run ended without printing {text!r}")


def assert_same(workshop, run: str) -> None:
    """Weights, optimizer, generators, data order and metrics equal those of the undisturbed run."""
    want, got = workshop.metrics("undisturbed"), workshop.metrics(run)
    assert [reproducible(row) for row in got] == [reproducible(row) for row in want]
    a, b = workshop.weights("undisturbed"), workshop.weights(run)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    first, second = optimizer_state(workshop, "undisturbed"), optimizer_state(workshop, run)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def optimizer_state(workshop, run: str) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint, read by torch's own reader."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    folder = workshop.folder / run / "checkpoints" / f"step_{STEPS:08d}"
    target = workshop.folder / f"{run}.pt"
    dcp_to_torch_save(folder / "backend", target)
    flat: dict[str, torch.Tensor] = {}

    def walk(at: str, value: object) -> None:
        if isinstance(value, torch.Tensor):
            flat[at] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{at}/{key}", inner)

    walk("", torch.load(target, weights_only=True))
    assert any("exp_avg" in name for name in flat)
    return flat


def test_half_and_half_is_the_whole(undisturbed) -> None:
    undisturbed.train("halves", *OPTIONS, f"algorithm.steps={STEPS // 2}")
    done = undisturbed.train("halves", *OPTIONS)
    assert f"resuming after step {STEPS // 2}" in done.out
    assert_same(undisturbed, "halves")


@pytest.mark.parametrize("seed", range(5))
def test_killed_at_a_random_moment(undisturbed, seed: int) -> None:
    run = f"killed{seed}"
    chance = random.Random(seed)
    process = start(undisturbed, run)
    wait_for(process, f"step {chance.randint(1, STEPS - 2)}/{STEPS}")
    time.sleep(chance.random() * 0.3)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL, "the run was over before the kill"
    before = undisturbed.metrics(run)
    assert len(before) < STEPS, "the kill came too late to matter"
    saved = list((undisturbed.folder / run / "checkpoints").glob("step_*"))
    done = undisturbed.train(run, *OPTIONS)
    assert ("resuming after step" if saved else "starting from step 1") in done.out
    assert_same(undisturbed, run)


def test_killed_between_the_metrics_and_the_checkpoint(undisturbed, install) -> None:
    """A watcher kills the run right after step 3's row is written and before its checkpoint is."""
    source = (
        "import os, signal\nfrom mmrl_core import hookimpl\nmmrl_api = 1\n"
        "@hookimpl\ndef mmrl_step_end(step):\n    if step == 3:\n        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = undisturbed.train("watched", *OPTIONS, check=False, **install("assassin", source))
    assert done.status == -signal.SIGKILL
    assert len(undisturbed.metrics("watched")) == 3
    resumed = undisturbed.train("watched", *OPTIONS)
    assert "resuming after step 2" in resumed.out
    assert_same(undisturbed, "watched")


def test_two_ranks_killed_and_resumed(shared_workshop) -> None:
    ranks = ["launcher={name: local, processes: 2}"]
    shared_workshop.train("pair", *OPTIONS, *ranks)
    process = start(shared_workshop, "pair-killed", *ranks)
    wait_for(process, f"step 3/{STEPS}")
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL
    _gone, alive = psutil.wait_procs(children, timeout=10)
    assert not alive, "ranks outlived their launcher"
    shared_workshop.train("pair-killed", *OPTIONS, *ranks)
    a, b = shared_workshop.metrics("pair"), shared_workshop.metrics("pair-killed")
    assert [reproducible(row) for row in a] == [reproducible(row) for row in b]
    one, two = shared_workshop.weights("pair"), shared_workshop.weights("pair-killed")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_of_two_ranks_goes_on_with_one(undisturbed) -> None:
    """Shards are re-sharded; rounding differs from the run on one rank, nothing else does."""
    undisturbed.train("shrunk", *OPTIONS, "algorithm.steps=4", "launcher={name: local, processes: 2}")
    done = undisturbed.train("shrunk", *OPTIONS)
    assert "resuming after step 4" in done.out
    for want, got in zip(undisturbed.metrics("undisturbed"), undisturbed.metrics("shrunk"), strict=True):
        assert got["grpo/score/mean"] == pytest.approx(want["grpo/score/mean"], abs=1e-6), want["step"]
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-2), want["step"]
    a, b = undisturbed.weights("undisturbed"), undisturbed.weights("shrunk")
    # AdamW turns the sign of a gradient that is nearly 0 into a whole step, so a few entries may differ by more
    close = [torch.isclose(a[name], b[name], rtol=1e-3, atol=1e-4).float().mean() for name in a]
    assert min(float(fraction) for fraction in close) > 0.99


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_saves_and_leaves(undisturbed, ranks: int) -> None:
    run = f"asked{ranks}"
    options = ["checkpoint.every=0", f"launcher={{name: local, processes: {ranks}}}"]
    process = start(undisturbed, run, *options)
    wait_for(process, f"step 2/{STEPS}")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    saved = sorted(p.name for p in (undisturbed.folder / run / "checkpoints").iterdir())
    assert len(saved) == 1, "one checkpoint, at the step it was told to stop"
    assert "stopped" in out
    done = undisturbed.train(run, *OPTIONS, *options)
    assert f"resuming after step {int(saved[0][-2:])}" in done.out
    if ranks == 1:
        assert_same(undisturbed, run)


def test_a_corrupt_checkpoint_is_named_and_the_one_before_is_used(undisturbed) -> None:
    undisturbed.train("corrupt", *OPTIONS, "algorithm.steps=4", "checkpoint.keep=3")
    newest = undisturbed.folder / "corrupt" / "checkpoints" / "step_00000004"
    shard = next((newest / "backend").glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    done = undisturbed.train("corrupt", *OPTIONS, "checkpoint.keep=3")
    assert shard.name in done.err
    assert "resuming after step 3" in done.out
    assert_same(undisturbed, "corrupt")


def test_another_recipe_is_refused_unless_accepted(undisturbed) -> None:
    undisturbed.train("changed", "algorithm.steps=2")
    done = undisturbed.train("changed", "algorithm.steps=3", "optimizer.lr=0.5", check=False)
    assert done.status == 1
    assert "optimizer.lr: 0.001 -> 0.5" in done.err
    assert "allow_recipe_change" in done.err
    accepted = undisturbed.train(
        "changed", "algorithm.steps=3", "optimizer.lr=0.002", "checkpoint.allow_recipe_change=true"
    )
    assert "resuming after step 2" in accepted.out
    never = undisturbed.train("changed", "algorithm.steps=4", "checkpoint.resume=never", check=False)
    assert never.status == 1
    assert "another run_dir" in never.err


def test_without_an_optimizer(undisturbed) -> None:
    light = ["algorithm.steps=2", "checkpoint.save_optimizer=false"]
    undisturbed.train("light", *light)
    refused = undisturbed.train("light", "algorithm.steps=3", check=False)
    assert refused.status == 1
    assert "load_optimizer: false" in refused.err
    done = undisturbed.train("light", "algorithm.steps=3", "checkpoint.load_optimizer=false")
    assert "with a fresh optimizer" in done.out
