"""verl's Megatron engine through the backend `verl-megatron`, on CPUs and in fp32, which verl itself does not allow.

Only what `megatron_without_cuda` lists is changed, in processes of their own. It is not a run on CUDA: attention for
packed rows, bf16 and TransformerEngine's layers are left out.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from mmrl_core.testing.stage import run_ranks
from mmrl_core.testing.tiny import tiny_language_model

RANKS = 2

for module in ("mbridge", "einops", "mmrl_mindspeed", "megatron"):
    if importlib.util.find_spec(module) is None:
        pytest.skip(
            f"NOT TESTED: verl's Megatron engine, because {module} is missing: pip install 'mbridge[megatron]' "
            "mmrl-mindspeed",
            allow_module_level=True,
        )


@pytest.mark.parametrize(
    ("tied", "options"),
    [
        (True, {"pipeline_parallel": 2, "micro_batch_samples": 3}),
        pytest.param(False, {"tensor_parallel": 2, "activation_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param(False, {"micro_batch_samples": 4}, marks=pytest.mark.slow),
    ],
    ids=["PP2", "TP2", "DP2"],
)
def test_equal_to_transformers_and_fsdp2(tmp_path: Path, tied: bool, options: dict[str, Any]) -> None:
    """On two ranks: log-probs, entropy, the reference, exported names and values, each parameter's gradient, updates
    with one of a NaN among them, and checkpoints with and without the optimizer."""
    tiny_language_model(tmp_path / "model", architecture="qwen2", tie_word_embeddings=tied)
    (tmp_path / "case.json").write_text(json.dumps({"options": options}))
    run_ranks("verl_megatron_ranks", [str(tmp_path)], RANKS, tmp_path, timeout_s=550)
    for rank in range(RANKS):
        seen = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert seen["log_probs"] <= 1e-5, seen
        assert seen["entropy"] <= 1e-5, seen
        assert seen["reference"] <= 1e-5, seen
        assert seen["names"], seen
        assert seen["exported"] == [], seen
        assert seen["gradient"] <= 1e-5, seen
        assert seen["kept"] == [], f"looking at gradients changed weights: {seen}"
        assert seen["changes"] <= 1e-4, seen
        assert seen["metrics"] <= 1e-3, seen
        assert seen["agreed"], f"ranks returned different metrics: {seen}"
        assert seen["loaded"] == [], seen
        assert seen["resumed"] == [], seen
        assert seen["weights alone"] == [], seen
        assert 0.0 < seen["next"] < 0.1, seen
