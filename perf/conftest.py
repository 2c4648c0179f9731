"""Options and fixtures of the benchmark rows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside this file, whatever pytest's import mode

from rig import built_run, text_recipe

from mmrl_core.grpo.run import Run
from mmrl_core.perf import machine
from mmrl_core.testing.tiny import tiny_language_model

SMOLLM2 = "mmrl:smollm2-135m-instruct"
ROUNDS = {"tiny": 20, "smollm2": 5}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mmrl")
    group.addoption(
        "--size", choices=sorted(ROUNDS), default="tiny", help="model of the text rows: random tiny, or SmolLM2-135M"
    )
    group.addoption("--tokens", type=int, default=16, help="new tokens of every sample")
    group.addoption("--rounds", type=int, default=None, help="times each row is measured (tiny 20, smollm2 5)")


class Bench:
    """One run at a time: a process joins a process group once, and two models would compete for memory."""

    def __init__(self, size: str, tokens: int, folder: Path) -> None:
        self.size, self.tokens, self.folder = size, tokens, folder
        self._open = ExitStack()
        self._key: object = None
        self._run: Run | None = None
        self._count = 0

    def run(self, *, weights: str = "shared", micro_batch_groups: int = 4) -> Run:
        """A run ready for its first step; the last one if it was built alike."""
        key = (weights, micro_batch_groups)
        if self._run is None or key != self._key:
            self.close()
            self._count += 1
            folder = self.folder / str(self._count)
            values = text_recipe(
                self.model(),
                folder,
                rollout={"name": "hf", "weights": weights},
                backend={"name": "fsdp2", "micro_batch_groups": micro_batch_groups},
                sampling={"max_new_tokens": self.tokens, "temperature": 1.0, "ignore_eos": True},
            )
            self._run = self._open.enter_context(built_run(values, folder))
            self._key = key
        return self._run

    def close(self) -> None:
        """End the current run."""
        self._run = self._key = None
        self._open.close()

    def model(self) -> str:
        if self.size == "tiny":
            folder = self.folder / "model"
            return str(folder if folder.exists() else tiny_language_model(folder))
        from mmrl_core.packaged_models import local_path

        return local_path(SMOLLM2)


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Builds runs of the chosen size; the last one ends with the module, so that others may join."""
    config = request.config
    bench = Bench(config.getoption("size"), config.getoption("tokens"), tmp_path_factory.mktemp("perf"))
    yield bench
    bench.close()


@pytest.fixture(scope="session")
def rounds(request: pytest.FixtureRequest) -> int:
    """Times a row is measured."""
    asked: int | None = request.config.getoption("rounds")
    return ROUNDS[request.config.getoption("size")] if asked is None else asked


@pytest.fixture(scope="session")
def provenance() -> dict[str, Any]:
    """Where a number comes from; every row carries it."""
    import torch

    return {
        "fingerprint": machine.fingerprint(torch.get_num_threads()),
        "versions": machine.versions(["mmrl-core", "torch", "transformers"]),
        "commit": machine.commit(),
        "load_average": machine.load_average(),
    }


@pytest.fixture
def row(benchmark: Any, rounds: int, provenance: dict[str, Any]) -> Callable[..., float]:
    """Measure one row: `row(function, **extra_info) -> median seconds` (after one warm-up round).

    `setup`, when given, makes the function's arguments anew for each round, outside the measured time. `per_second`
    maps names to amounts of work: they become extra_info as amount / median.
    """

    def measure(
        function: Callable[..., Any],
        *,
        setup: Callable[[], Any] | None = None,
        per_second: dict[str, float] | None = None,
        count: int | None = None,
        iterations: int = 1,
        **facts: Any,
    ) -> float:
        extra = {} if setup is None else {"setup": setup}
        benchmark.pedantic(
            function, rounds=count or rounds, warmup_rounds=1, iterations=iterations if setup is None else 1, **extra
        )
        benchmark.extra_info.update(provenance)
        benchmark.extra_info.update(facts)
        if benchmark.stats is None:  # --benchmark-disable: the function ran once, nothing was measured
            return float("nan")
        median: float = benchmark.stats.stats.median
        benchmark.extra_info.update({name: amount / median for name, amount in (per_second or {}).items()})
        return median

    return measure
