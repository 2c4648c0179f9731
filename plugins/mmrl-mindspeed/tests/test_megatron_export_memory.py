"""Streaming the weights to a rollout engine holds a bucket and the tensor at work, not a second model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from megatron_models import write_model

from mmrl_core.testing.stage import run_ranks
from mmrl_core.testing.tiny import tiny_recipe

BUCKET = 8 << 20


@pytest.mark.parametrize("layout", [{"tensor_parallel": 2}, {"pipeline_parallel": 2}], ids=["TP2", "PP2"])
def test_export_never_holds_two_copies(tmp_path: Path, layout: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(
        tmp_path / "model", "qwen2", layers=8, hidden_size=512, intermediate_size=2048, tie_word_embeddings=False
    )
    recipe = tiny_recipe(model, tmp_path / "run", backend={"name": "megatron", **layout})
    (tmp_path / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(1 << 20))  # freed tensors leave the process
    run_ranks("export_memory_ranks", [str(tmp_path), str(BUCKET)], 2, tmp_path)
    largest = 2 * 2048 * 512 * 4  # gate and up, fused: whole, its shards, and its parts
    for rank in range(2):
        said = json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8"))
        assert said["growth"] < BUCKET + 4 * largest, said
        assert said["growth"] < said["model"] / 2, said
