"""A tied table's gradient: what looking up and the head's product add to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import embedding, linear
from transformers import LlamaConfig, LlamaForCausalLM

from mmrl_core.text import model_folder
from mmrl_core.text.token_stats import token_stats

IDS = torch.tensor([[3, 5, 3, 9], [5, 1, 0, 3]])


def tiny(*, tied: bool = True) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=tied,
        )
    )


def table_gradient(model: Any, *, passes: int, logits_bytes: int) -> tuple[Tensor, list[str]]:
    """The gradient of the embedding after `passes` look-ups, and the operators that computed it."""
    embed, head = model_folder.ends(model)
    hidden = sum(model.get_decoder()(**embed(IDS + n), use_cache=False).last_hidden_state for n in range(passes))
    assert isinstance(hidden, Tensor)
    log_probs, entropy = token_stats(
        head, hidden.flatten(0, 1), IDS.flatten(), temperature=0.7, logits_bytes=logits_bytes
    )
    with torch.profiler.profile() as profile:
        (log_probs.sum() + 0.3 * entropy.sum()).backward()
    return model.get_input_embeddings().weight.grad, [event.key for event in profile.key_averages()]


def expected(model: Any, *, passes: int) -> Tensor:
    """The same by transformers' own forward and plain autograd, in float64."""
    model = model.double()
    model.zero_grad()
    hidden = sum(model.get_decoder()(IDS + n, use_cache=False).last_hidden_state for n in range(passes))
    logs = (model.get_output_embeddings()(hidden) / 0.7).log_softmax(-1)
    entropy = -(logs.exp() * logs).sum()
    (logs.gather(-1, IDS[..., None]).sum() + 0.3 * entropy).backward()
    gradient: Tensor = model.get_input_embeddings().weight.grad
    return gradient


@pytest.mark.parametrize("logits_bytes", [1 << 20, 4 * 40 * 3], ids=["whole", "chunks"])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_gradient_is_autograds_own(tied: bool, passes: int, logits_bytes: int) -> None:
    model = tiny(tied=tied)
    got, operators = table_gradient(model, passes=passes, logits_bytes=logits_bytes)
    assert got.layout == torch.strided
    want = expected(model, passes=passes)
    assert (got - want).norm() <= 1e-5 * want.norm()
    # what it is for: no table of zeros for a look-up
    assert ("aten::embedding_dense_backward" in operators) == (not tied)


def test_either_end_may_be_unused() -> None:
    weight = torch.randn(6, 4, requires_grad=True)
    rows, table = model_folder._TiedTable.apply(weight)
    embedding(torch.tensor([1, 1, 4]), rows, sparse=True).sum().backward()
    assert weight.grad is not None
    assert weight.grad.sum(-1).tolist() == [0, 8, 0, 0, 4, 0]
    weight.grad = None
    rows, table = model_folder._TiedTable.apply(weight)
    linear(torch.ones(1, 4), table).sum().backward()
    assert torch.equal(weight.grad, torch.ones(6, 4))


def test_a_frozen_table_stays_without_gradient() -> None:
    model = tiny()
    model.get_input_embeddings().weight.requires_grad_(False)
    embed, head = model_folder.ends(model)
    hidden = model.get_decoder()(**embed(IDS), use_cache=False).last_hidden_state
    head(hidden[0]).sum().backward()
    assert model.get_input_embeddings().weight.grad is None
    assert model.get_decoder().layers[0].mlp.up_proj.weight.grad is not None
