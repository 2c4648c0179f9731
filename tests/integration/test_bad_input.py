"""What users, plugins and machines do wrong: one clear message each, nothing lost, nothing left running."""

from __future__ import annotations

import json
import signal

import psutil
import pytest

REWARDS = """
import os, time
from mmrl_core import Component, RewardResult, Reward, hookimpl, reward

mmrl_api = 1

@reward
def raises(sample):
    raise ValueError("broken on purpose")

@reward
def sometimes(sample):
    if sample.sample_id % 4 == 0:
        raise ValueError("every fourth fails")
    return float(len(sample.text or "") % 3)

@reward
def hangs(sample):
    time.sleep(3600)

@reward
def nan(sample):
    return float("nan")

class WrongCount(Reward):
    def score(self, samples):
        return [RewardResult(value=1.0)] * (len(samples) + 1)

@reward
def dies(sample):
    os._exit(7)

NAMES = {"raises": "raises", "sometimes": "sometimes", "hangs": "hangs", "nan": "nan", "wrong-count": "WrongCount",
         "dies": "dies"}

@hookimpl
def mmrl_rewards():
    return [Component(name=n, summary=n, target=f"{__name__}:{t}") for n, t in NAMES.items()]
"""


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("algorithm.steps=many", ["algorithm.steps", "many"]),
        ("algorithm.stepps=3", ["unknown field", "'steps'"]),
        ("backend=fsdp3", ["no backend called 'fsdp3'", "'fsdp2'"]),
        ("backend.micro_batch=3", ["unknown field", "micro_batch_groups"]),
        ("rewards.0.name=numerik", ["no reward called 'numerik'", "'numeric'"]),
        ("sampling.max_tokens=4", ["unknown field", "max_new_tokens"]),
        ("rewards.0.deadline_s=3", ["inline cannot enforce"]),
        ("model.path=no/such/folder", ["no/such/folder", "no such folder"]),
        ("data={name: jsonl, path: missing.jsonl}", ["missing.jsonl"]),
        ("algorithm.samples_per_prompt=1", ["samples_per_prompt", "2"]),
        ("algorithm.minibatches=9", ["minibatches (9)", "prompts_per_step (3)"]),
        ("device=tpu", ["no device called 'tpu'"]),
        ("device=cuda", ["cuda", "cannot run here"]),
    ],
)
def test_a_bad_recipe_is_one_message(shared_workshop, override: str, words: list[str]) -> None:
    done = shared_workshop.train("bad", override, check=False)
    assert done.status in (1, 2)
    for word in words:
        assert word in done.err, done.err
    assert "Traceback" not in done.err
    assert not (shared_workshop.folder / "bad" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["no rows"]),
        ('{"prompt": "a", "answer": "1"}\n{"answer": "1"}\n', [":2", "prompt"]),
        ('{"prompt": "a", "answer": "1"}\n{broken\n', [":2"]),
        ('{"prompt": 7, "answer": "1"}\n', [":1", "prompt"]),
    ],
)
def test_bad_data_names_the_row(workshop, content: str, words: list[str]) -> None:
    (workshop.folder / "data.jsonl").write_text(content)
    done = workshop.train("bad", "data={name: jsonl, path: data.jsonl}", check=False)
    assert done.status == 1
    for word in ["data.jsonl", *words]:
        assert word in done.err, done.err
    assert "Traceback" not in done.err


def test_a_long_prompt_stops_or_is_skipped_and_counted(workshop) -> None:
    rows = [{"prompt": "what is 1+1?" * n, "answer": "2"} for n in (1, 1, 1, 40)]
    (workshop.folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = "data={name: jsonl, path: data.jsonl}"
    done = workshop.train("bad", data, "model.policy.max_prompt_tokens=60", check=False)
    assert done.status == 1
    assert "data.jsonl:4" in done.err
    assert "max_prompt_tokens" in done.err
    workshop.train("good", data, "model.policy={max_prompt_tokens: 60, long_prompts: skip}")
    assert sum(row["data/skipped_long_prompts"] for row in workshop.metrics("good")) > 0
    none = workshop.train("none", data, "model.policy={max_prompt_tokens: 1, long_prompts: skip}", check=False)
    assert none.status == 1
    assert "accepted none" in none.err


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("raises", "run: worker", "broken on purpose"),
        ("raises", "run: inline", "broken on purpose"),
        ("hangs", "run: worker, deadline_s: 1", "1 s"),
        ("nan", "run: worker", "nan"),
        ("wrong-count", "run: worker", "13"),
        ("dies", "run: worker", "7"),
    ],
)
def test_a_reward_that_always_fails_stops_the_run(workshop, install, name: str, options: str, reason: str) -> None:
    env = install("bad-rewards", REWARDS)
    stop = workshop.train("stop", f"rewards=[{{name: {name}, {options}, on_failure: stop}}]", check=False, **env)
    assert stop.status == 1, stop.all
    assert reason in stop.err.lower()
    assert name in stop.err
    assert "bad-rewards" in stop.err
    assert "Traceback" not in stop.err.split("mmrl:")[-1]
    assert not leftovers(workshop)


def test_dropped_samples_are_counted_and_never_become_numbers(workshop, install) -> None:
    env = install("bad-rewards", REWARDS)
    workshop.train("drop", "rewards=[{name: sometimes}]", **env)
    for row in workshop.metrics("drop"):
        assert row["rewards/failed_samples"] == 3
        assert row["grpo/score/max"] <= 2
    workshop.train(
        "group", "rewards=[{name: sometimes, on_failure: drop_group}, {name: length, maximum: 3}]", check=False, **env
    )
    log = (workshop.folder / "group" / "run.log").read_text()
    assert "3 steps in a row had no group to learn from" in log


def test_a_hanging_reward_costs_its_deadline_and_the_run_goes_on(workshop, install) -> None:
    env = install(
        "bad-rewards",
        REWARDS.replace(
            "    time.sleep(3600)",
            "    time.sleep(3600 if sample.sample_id == 5 else 0)\n    return float(len(sample.text or '') % 3)",
        ),
    )
    workshop.train("hang", "rewards=[{name: hangs, deadline_s: 2, batch_size: 4}]", "algorithm.steps=2", **env)
    rows = workshop.metrics("hang")
    assert [row["rewards/timeouts"] for row in rows] == [1, 1]
    assert [row["rewards/restarts"] for row in rows] == [1, 1]
    assert [row["rewards/failed_samples"] for row in rows] == [4, 4]
    assert not leftovers(workshop)


def leftovers(workshop) -> list[psutil.Process]:
    """Processes that still run in the workshop's folder."""
    found = []
    for process in psutil.process_iter(["cwd", "pid"]):
        try:
            if process.cwd() == str(workshop.folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
    return found


def test_a_broken_plugin_that_nobody_named_is_one_warning(workshop, install) -> None:
    env = install("broken-plugin", "import no_such_module_at_all\n")
    done = workshop.train("fine", "algorithm.steps=1", **env)
    lines = [line for line in done.err.splitlines() if "broken-plugin" in line]
    assert len(lines) == 1
    assert "no_such_module_at_all" in lines[0]


def test_a_broken_plugin_that_the_recipe_needs_is_fatal_with_its_traceback(workshop, install) -> None:
    env = install("broken-plugin", "import no_such_module_at_all\n")
    done = workshop.train("needed", "rewards.0.name=broken-plugin:thing", check=False, **env)
    assert done.status == 2
    for word in ("broken-plugin", "0.3", "no_such_module_at_all", "Traceback"):
        assert word in done.err


def test_two_plugins_with_one_name_must_be_told_apart(workshop, install) -> None:
    source = (
        "from mmrl_core import Component, hookimpl, reward\nmmrl_api = 1\n"
        "@reward\ndef numeric(sample):\n    return float(sample.sample_id % 2)\n"
        "@hookimpl\ndef mmrl_rewards():\n"
        "    return [Component(name='numeric', summary='x', target=__name__ + ':numeric')]\n"
    )
    env = install("other-rewards", source)
    done = workshop.train("two", "rewards=[numeric]", check=False, **env)
    assert done.status == 2
    assert "mmrl-core" in done.err
    assert "other-rewards:numeric" in done.err
    workshop.train("chosen", "rewards=['other-rewards:numeric']", "algorithm.steps=1", **env)


def test_a_watching_plugin_that_fails_does_not_stop_the_run(workshop, install) -> None:
    source = (
        "from mmrl_core import hookimpl\nmmrl_api = 1\n"
        "@hookimpl\ndef mmrl_step_end(step, metrics):\n    raise RuntimeError('watcher broke')\n"
    )
    env = install("watcher", source)
    done = workshop.train("watched", "algorithm.steps=2", **env)
    assert done.err.count("WARNING: plugin watcher") == 1
    assert "watcher broke" in done.err
    assert len(workshop.metrics("watched")) == 2


def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(workshop) -> None:
    """A limit on file size stands in for the full disk: the same OSError at the same places."""
    workshop.train("disk", "algorithm.steps=2")
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from mmrl_core.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-c", code, "train", str(workshop.recipe), "run_dir=disk", "algorithm.steps=4"],
        cwd=workshop.folder,
        env=workshop.environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "checkpoint" in done.stderr
    assert "step_00000002" in done.stderr, "the intact one is named"
    names = sorted(p.name for p in (workshop.folder / "disk" / "checkpoints").iterdir())
    assert names == ["step_00000002"]
    again = workshop.train("disk", "algorithm.steps=4")
    assert "resuming after step 2" in again.out


def test_ctrl_c_twice_leaves_nothing_running(workshop, install) -> None:
    import subprocess
    import time

    env = install("bad-rewards", REWARDS)
    process = subprocess.Popen(
        workshop.command("train", str(workshop.recipe), "run_dir=cc", "rewards=[{name: hangs, deadline_s: 600}]"),
        cwd=workshop.folder,
        env=workshop.environment(**env),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 90
    while not (workshop.folder / "cc" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    time.sleep(1.5)
    assert not leftovers(workshop)
