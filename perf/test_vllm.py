"""Rows of the combination cpu + fsdp2 + vllm + numeric + causal_lm, in the environment that has vLLM: the parts of a
step that the engine has a share in. As in test_text.py, but for the tiny model: its heads are 32 wide, not 16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from rig import built_run, requests, text_recipe

from mmrl_core.grpo.run import Run
from mmrl_core.grpo.trainer import hand_over_weights
from mmrl_core.packaged_models import local_path
from mmrl_core.plugins import load_plugins
from mmrl_core.testing.tiny import tiny_language_model

Row = Callable[..., float]
SMOLLM2 = "mmrl:smollm2-135m-instruct"


def _missing() -> str:
    """Why it cannot run here, or nothing."""
    for found in load_plugins().found("rollout"):
        if found.name == "vllm":
            probe = found.probe()
            return "" if probe.available else probe.reason
    return "mmrl-vllm is not installed"


pytestmark = [
    pytest.mark.benchmark(group="cpu+fsdp2+vllm+numeric+causal_lm"),
    pytest.mark.skipif(bool(_missing()), reason=_missing() or "-"),
]


@pytest.fixture(scope="module")
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run ready for its first step."""
    folder: Path = tmp_path_factory.mktemp("perf-vllm")
    tiny = request.config.getoption("size") == "tiny"
    model = str(tiny_language_model(folder / "model", head_dim=32)) if tiny else local_path(SMOLLM2)
    tokens = request.config.getoption("tokens")
    values = text_recipe(
        model,
        folder,
        rollout={"name": "vllm", "kv_cache_mb": 256, "max_model_len": 512, "max_num_seqs": 32},
        sampling={"max_new_tokens": tokens, "temperature": 1.0, "ignore_eos": True},
    )
    with ExitStack() as stack:
        yield stack.enter_context(built_run(values, folder))


def test_rollout(run: Run, row: Row, request: pytest.FixtureRequest) -> None:
    """Generation of the step's 32 samples, decoding to text included."""
    asked = requests(run)
    rollouts = run.engine.generate(asked, run.sampling)
    generated = int(rollouts.mask.sum())
    assert generated == len(rollouts) * request.config.getoption("tokens")
    row(
        lambda: run.engine.generate(asked, run.sampling),
        samples=len(rollouts),
        response_tokens=generated,
        model=request.config.getoption("size"),
        per_second={"generated_tokens_per_second": float(generated)},
    )


def test_weight_sync(run: Run, row: Row, request: pytest.FixtureRequest) -> None:
    """New weights into the engine, packed for its kernels."""
    size = sum(t.numel() * t.element_size() for bucket in run.backend.export_weights() for _, t in bucket)
    row(
        lambda: hand_over_weights(run),
        bytes=size,
        model=request.config.getoption("size"),
        per_second={"bytes_per_second": float(size)},
    )
