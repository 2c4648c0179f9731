"""Rows that compare training backends and layouts on two ranks of this machine: the same rows of tokens, in one run.

4 prompts of 48 tokens x 8 samples of `--tokens` tokens, fp32, one thread a rank. `tokens_per_second` counts prompt and
response tokens of all samples, whether a backend computes a group's prompt once (fsdp2) or in every row (the others).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from backend_ranks import GROUPS, PROMPT, SAMPLES

from mmrl_core.plugins import load_plugins

RANKS = 2
COMBINATIONS: dict[str, dict[str, Any]] = {
    "fsdp2": {"name": "fsdp2", "micro_batch_groups": 1},
    "fsdp2, prompts repeated": {"name": "fsdp2", "micro_batch_groups": 1},
    "megatron DP2": {"name": "megatron"},
    "megatron TP2": {"name": "megatron", "tensor_parallel": 2},
    "megatron TP2+SP": {"name": "megatron", "tensor_parallel": 2, "sequence_parallel": True},
    "megatron PP2": {"name": "megatron", "pipeline_parallel": 2},
    "verl-fsdp2": {"name": "verl-fsdp2", "micro_batch_samples": SAMPLES},
}

pytestmark = pytest.mark.benchmark(group="cpu x 2: training backends")


class Ranks:
    """Two processes of `backend_ranks.py` that do what they are told, together."""

    def __init__(self, model: str, folder: Path) -> None:
        self._processes = [
            subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("backend_ranks.py")), model, str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=(folder / f"rank{rank}.log").open("w"),
                text=True,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(RANKS),
                    "LOCAL_WORLD_SIZE": str(RANKS),
                    "MMRL_STORE": str(folder / "store"),
                },
            )
            for rank in range(RANKS)
        ]
        self._folder = folder

    def tell(self, line: str) -> None:
        """Every rank runs the command; returns when all have."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(line + "\n")
            process.stdin.flush()
        for rank, process in enumerate(self._processes):
            assert process.stdout is not None
            answer = process.stdout.readline().strip()
            assert answer == "done", (self._folder / f"rank{rank}.log").read_text()[-3000:]

    def close(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def ranks(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """The ranks, started once."""
    started = Ranks(bench.model(), tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()


@pytest.fixture(scope="module", params=COMBINATIONS)
def combination(request: pytest.FixtureRequest, ranks: Ranks, bench: Any) -> str:
    """One backend in one layout, built on the ranks; the one before is gone."""
    name: str = request.param
    backend = COMBINATIONS[name]["name"]
    if not any(found.name == backend for found in load_plugins().found("backend")):
        pytest.skip(f"no installed plugin declares the backend {backend}")
    sharing = "off" if "repeated" in name else "auto"
    sections = {
        "backend": COMBINATIONS[name],
        "model": {
            "path": bench.model(),
            "dtype": "float32",
            "policy": {"name": "causal_lm", "prefix_sharing": sharing},
        },
        "sampling": {"max_new_tokens": bench.tokens, "temperature": 1.0},
    }
    ranks.tell(f"build {json.dumps(sections)}")
    return name


@pytest.mark.parametrize("part", ["update", "old_log_probs", "export"])
def test_part(ranks: Ranks, combination: str, part: str, bench: Any, row: Callable[..., float]) -> None:
    """One update; a pass for log-probs alone; streaming the whole weights to both ranks."""
    tokens = GROUPS * SAMPLES * (PROMPT + bench.tokens)
    rates = {} if part == "export" else {"tokens_per_second": float(tokens)}
    row(
        lambda: ranks.tell(part),
        per_second=rates,
        combination=combination,
        part=part,
        model=bench.size,
        ranks=RANKS,
        samples=GROUPS * SAMPLES,
        groups=GROUPS,
        prompt_tokens=PROMPT,
        response_tokens=bench.tokens,
    )
