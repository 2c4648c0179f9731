"""Kills ranks at random moments of a run on a Ray cluster; run it for longer than the tests do:

python kill_moments.py 10
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from ray_nodes import RayNode, isolated, ranks_of, wait_for_nodes

from mmrl_core.metrics.jsonl import read_metrics
from mmrl_core.metrics.names import reproducible
from mmrl_core.testing.tiny import tiny_language_model, tiny_recipe, write_recipe_file

HERE = Path(__file__).parent
LIMIT_S = 540.0
DRIVER = """
import sys
from mmrl_core.errors import MmrlError
from mmrl_core.launch.failure import report_error
from mmrl_core.plugins import resolve
from mmrl_core.recipe import load_recipe

recipe, source = load_recipe(sys.argv[1])
exec(sys.argv[3])
try:
    sys.exit(resolve(recipe, source).launcher.create().launch(recipe, sys.argv[2]))
except MmrlError as error:
    sys.exit(report_error(error))
"""


def model_in(place: Path) -> Path:
    """A tiny model whose answers differ in length, so that there is something to learn."""
    return tiny_language_model(place / "model", end_tokens="0123456789abcdefghij")


def recipe(model: Path, run: Path, launcher: Mapping[str, Any], steps: int) -> Path:
    """A recipe file of a run that saves after every step."""
    made = tiny_recipe(
        model,
        run,
        launcher=dict(launcher),
        rewards=[{"name": "length", "run": "inline", "maximum": 1, "ramp": 5}],
        algorithm={"steps": steps},
        checkpoint={"every": 1, "keep": 2, "export": True},
    )
    return write_recipe_file(run.parent / f"{run.name}.yaml", made)


def start(
    file: Path, worker: str = "mmrl_core.launch.worker", folder: Path = HERE, patch: str = ""
) -> subprocess.Popen[str]:
    """A process that launches it, with `worker` on the ranks; modules in `folder` are importable there.

    It leads a session, as a terminal's command does, and finds the token by itself.
    """
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(file), worker, patch],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name not in ("RAY_AUTH_MODE", "RAY_ADDRESS")},
        start_new_session=True,
    )


def numbers(run: Path) -> list[dict[str, Any]]:
    """The metrics of every step without what depends on time and memory."""
    path = run / "metrics.jsonl"
    return [reproducible(row) for row in read_metrics(path)] if path.exists() else []


def weights(run: Path) -> bytes:
    return (run / "export" / "model.safetensors").read_bytes()


def run_with_kills(file: Path, run: Path, kills: int, steps: int, seed: int) -> str:
    """Run it, kill -9 a random rank `kills` times, each time somewhere in its share of the steps; returns stderr.

    The share is what makes the moments differ: starting, sampling, updating, saving, exporting.
    """
    dice = random.Random(seed)
    process = start(file, "guarded_rank")
    try:
        _kill_at_random(process, run, kills, steps, dice)
        out, err = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    assert process.returncode == 0, f"{out}\n{err}"
    return err


def _kill_at_random(process: subprocess.Popen[str], run: Path, kills: int, steps: int, dice: random.Random) -> None:
    deadline = time.monotonic() + LIMIT_S
    dead: set[int] = set()
    for number in range(kills):
        wanted = dice.randrange(number * steps // kills, (number + 1) * steps // kills)
        while len(numbers(run)) < wanted or not alive(run, dead):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.03)
        time.sleep(dice.random() * (3.0 if wanted == 0 else 0.3))
        victim = dice.choice(alive(run, dead) or [None])
        assert victim is not None, "the run ended before this moment"
        dead |= {rank.pid for rank in alive(run, dead)}
        victim.kill()
        print(f"killed after step {wanted}: pid {victim.pid}", flush=True)


def alive(run: Path, dead: set[int]) -> list[psutil.Process]:
    """Ranks of the present start."""
    return [rank for rank in ranks_of(run) if rank.pid not in dead and rank.status() != psutil.STATUS_ZOMBIE]


def main(kills: int) -> None:
    """Compare a run with so many kills, three at a time, to an undisturbed one of the launcher local."""
    steps = 12
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        own = isolated(place / "token")
        os.environ.clear()
        os.environ |= own
        model = model_in(place)
        calm = place / "calm"
        assert start(recipe(model, calm, {"name": "local", "processes": 2}, steps)).wait() == 0
        with RayNode(cpus=2) as head, RayNode(cpus=2, join=head.address):
            wait_for_nodes(head.address, 2)
            launcher = {"name": "ray", "address": head.address, "processes": 2, "strategy": "SPREAD"}
            for first in range(0, kills, 3):
                now = min(3, kills - first)
                run = place / f"kills{first}"
                seed = random.SystemRandom().randrange(2**32)
                print("seed", seed, flush=True)
                file = recipe(model, run, {**launcher, "max_restarts": now}, steps)
                said = run_with_kills(file, run, now, steps, seed)
                assert said.count("(SIGKILL)") == said.count(f"of {now}: all ranks start again") == now, said
                assert weights(run) == weights(calm), f"seed {seed}"
                assert numbers(run) == numbers(calm), f"seed {seed}"
                print(f"{first + now} kills: the same weights and metrics", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
