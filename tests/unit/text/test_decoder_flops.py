"""Operations of a forward, against torch's own count of what a forward does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmrl_core.testing.tiny import tiny_language_model
from mmrl_core.text.flops import DecoderSize


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoModelForCausalLM

    folder = tiny_language_model(tmp_path_factory.mktemp("model"), architecture=request.param)
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def counted(model: Any, tokens: int) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.int64), use_cache=False)
    return int(counter.get_total_flops())


def test_sizes_are_those_that_torch_counts(model: Any) -> None:
    """Eager attention computes the whole square, and the logits of all tokens."""
    size = DecoderSize.of(model.config)
    assert size is not None
    rotary = counted(model, 9) - 2 * 9 * (size.layer_weights + size.head_weights) - 4 * size.attention_width * 81
    # angles of the rotary embedding are a product too: one multiplication and addition for each pair and token
    assert rotary == 2 * 9 * model.config.hidden_size // model.config.num_attention_heads // 2


def test_a_forward_counts_what_is_needed() -> None:
    size = DecoderSize(layer_weights=1000, head_weights=100, attention_width=10)
    one = size.forward([(3, [2])])  # 4 tokens fed, attending to 1 + 2 + 3 + 4; 2 predicted
    assert one == 2 * 1000 * 4 + 4 * 10 * 10 + 2 * 100 * 2
    assert size.forward([(3, [2, 2])]) - one == 2 * 1000 * 1 + 4 * 10 * 4 + 2 * 100 * 2, "a prompt is computed once"
    assert size.forward([(3, [2]), (3, [2])]) == 2 * one
    assert size.forward([]) == 0


def test_models_with_experts_are_unknown() -> None:
    assert DecoderSize.of(SimpleNamespace(num_local_experts=8)) is None


def test_a_policy_counts_its_rollouts(tmp_path: Path) -> None:
    from mmrl_core.contracts import Rollouts
    from mmrl_core.policies.causal_lm import CausalLmPolicy
    from mmrl_core.policies.options import CausalLmOptions, TokenSampling
    from mmrl_core.recipe import ModelSpec

    spec = ModelSpec(path=str(tiny_language_model(tmp_path)))
    policy = CausalLmPolicy(CausalLmOptions(), spec, TokenSampling())
    policy.prepare()
    prompt = torch.zeros(3, dtype=torch.int64)
    rollouts = Rollouts(
        group_id=torch.tensor([0, 0, 1]),
        sample_id=torch.arange(3),
        mask=torch.ones(3, 2, dtype=torch.bool),
        behaviour_log_probs=torch.zeros(3, 2),
        truncated=torch.zeros(3, dtype=torch.bool),
        policy_version=0,
        payload={"prompt_ids": [prompt] * 3, "response_ids": [torch.zeros(2, dtype=torch.int64)] * 3},
    )
    from transformers import AutoConfig

    size = DecoderSize.of(AutoConfig.from_pretrained(tmp_path))
    assert size is not None
    assert policy.flops(rollouts) == size.forward([(3, [2, 2]), (3, [2])])
