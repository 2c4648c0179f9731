"""`verl-fsdp2` on models with experts: transformers' log-probs, and the gradients and updates of `fsdp2`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmrl_core.contracts import TrainingBackend
from mmrl_core.testing.stage import Rank
from mmrl_core.testing.texts import (
    CheckLoss,
    check_minibatch,
    collected,
    plain_model,
    plain_stats,
    relative_difference,
    text_rollouts,
)
from mmrl_core.testing.tiny import byte_tokenizer, tiny_recipe

TEMPERATURE = 0.8
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
}


def write_model(folder: Path, family: str) -> None:
    """Four experts, two of them for each token."""
    from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    tokenizer = byte_tokenizer()
    common: dict[str, Any] = {**SIZES, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    common |= {"eos_token_id": tokenizer.eos_token_id, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    if family == "mixtral":
        model: Any = MixtralForCausalLM(MixtralConfig(**common, num_local_experts=4))
    else:
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, num_experts=4, moe_intermediate_size=32))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rank]:
    with Rank.join("cpu", tmp_path_factory.mktemp("experts")) as joined:
        yield joined


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts(rank: Rank, family: str) -> None:
    folder = rank.folder / family
    write_model(folder, family)
    optimizer = {"lr": 1e-3, "eps": 1e-6}
    sampling = {"temperature": TEMPERATURE, "max_new_tokens": 9}

    def backend(name: str, **options: Any) -> TrainingBackend:
        made = {"name": name, **options}
        cast = rank.cast(tiny_recipe(folder, folder / "run", backend=made, sampling=sampling, optimizer=optimizer))
        backend.policy = cast.policy  # type: ignore[attr-defined]
        return cast.backend()

    theirs = backend("verl-fsdp2", micro_batch_samples=4)
    ours = backend("fsdp2")
    rollouts = text_rollouts(backend.policy)  # type: ignore[attr-defined]
    found = theirs.replay(rollouts)
    with torch.no_grad():
        expected = plain_stats(plain_model(folder), rollouts, TEMPERATURE)
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=0, atol=2e-5)
    torch.testing.assert_close(found.entropy, expected.entropy, rtol=0, atol=2e-5)

    start = collected(ours.export_weights())
    assert relative_difference(collected(theirs.export_weights()), start) == 0.0
    minibatch = check_minibatch(rollouts, torch.where(rollouts.mask, -5.0, 0.0))
    gradients = [collected(each.gradients(minibatch, CheckLoss())) for each in (theirs, ours)]
    assert sorted(gradients[0]) == sorted(gradients[1])
    assert any("experts" in name for name in gradients[0])
    assert relative_difference(*gradients) <= 1e-5
    for _ in range(2):
        for each in (theirs, ours):
            each.update(minibatch, CheckLoss())
    moved = [
        {name: weight - start[name] for name, weight in collected(each.export_weights()).items()}
        for each in (theirs, ours)
    ]
    assert relative_difference(*moved) <= 1e-4
