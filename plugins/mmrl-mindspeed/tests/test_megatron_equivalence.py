"""`megatron` computes what `fsdp2` computes, in every layout, on the same ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from megatron_models import write_model

from mmrl_core.testing.stage import run_ranks

TWO: Mapping[str, Mapping[str, Any]] = {
    "TP2": {"tensor_parallel": 2},
    "TP2+SP": {"tensor_parallel": 2, "sequence_parallel": True, "activation_checkpointing": True},
    "PP2": {"pipeline_parallel": 2},
    "PP2 uneven": {"pipeline_parallel": 2, "layers_per_stage": [3, 1], "micro_batch_samples": 2},
    "DP2": {"distributed_optimizer": False},
    "DP2 distributed": {"distributed_optimizer": True},
}
FOUR: Mapping[str, Mapping[str, Any]] = {
    "TP2xPP2": {"tensor_parallel": 2, "pipeline_parallel": 2, "sequence_parallel": True},
    "PP2xDP2": {"pipeline_parallel": 2},
    "TP2xDP2": {"tensor_parallel": 2},
}
LOG_PROBS, GRADIENT, COURSE = 2e-6, 1e-5, 1e-4


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        (2, {"llama": TWO, "qwen2": TWO, "qwen3": {"TP2+SP": TWO["TP2+SP"]}}),
        (4, {"llama": FOUR, "qwen2": {"TP2xPP2": FOUR["TP2xPP2"]}}),
    ],
)
def test_layouts_agree_with_fsdp2(tmp_path: Path, ranks: int, cases: Mapping[str, Mapping[str, Any]]) -> None:
    """fp32, from one Hugging Face checkpoint: log-probs, each parameter's gradient (of a loss over actions and of one
    over whole rows), the norm that clips, and ten updates, two a rollout; a NaN in one replica's rows changes
    nothing anywhere."""
    for family in cases:
        write_model(tmp_path / family, family)
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    run_ranks("megatron_equivalence_ranks", [str(tmp_path)], ranks, tmp_path, timeout_s=400)
    for rank in range(ranks):
        seen = json.loads((tmp_path / f"rank{rank}.json").read_text())
        for model, layouts in seen.items():
            for name, found in layouts.items():
                where = f"{model} {name} on rank {rank}: {found}"
                assert found["log_probs"] <= LOG_PROBS, where
                assert found["gradient"][0] <= GRADIENT, where
                assert found["norm"] <= GRADIENT, where
                assert found["probes"] <= COURSE, where
                assert found["changes"] <= COURSE, where
                assert found["moved"] > 0.1, f"training changed nothing: {where}"
                assert found["guarded"], f"a NaN was not kept out: {where}"
                assert found["agreed"], f"ranks returned different metrics: {where}"
