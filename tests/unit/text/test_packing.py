"""Packed rows: states and gradients are those of every row by itself; models that cannot take them are left alone."""

from __future__ import annotations

import functools
import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from mmrl_core.text import packing

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 12},
    "mistral": {"sliding_window": None},
    "gemma": {"head_dim": 12},
    "olmo2": {},
    "phi3": {"pad_token_id": 0},
    "gpt2": {"n_embd": 16, "n_head": 4, "n_layer": 2, "n_positions": 64},
}
OTHERS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 8},
    "gemma2": {"head_dim": 12, "sliding_window": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}
"""With what packed rows do not have: a window, a cap, a convolution."""

PROMPTS = [torch.tensor([5, 6, 7, 8, 9]), torch.tensor([3, 4]), torch.tensor([9, 1, 2])]
PROMPT_OF_ROW = torch.tensor([0, 0, 1, 2, 2, 2])
LENGTHS = [3, 1, 5, 0, 2, 5]
"""Of the responses: one has a token that is not fed, one has none."""


def tiny(family: str, options: dict[str, Any], attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = CONFIG_MAPPING[family](vocab_size=40, **{**sizes, **heads, **options})
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float64).eval()


def rows() -> tuple[Tensor, Tensor]:
    """Responses [6, 5], and which of their tokens count."""
    taken = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
    taken[2, 1] = False  # a token in the middle that is read, but not scored
    return torch.randint(1, 40, (6, 5), generator=torch.Generator().manual_seed(1)), taken


def apart(model: Any, responses: Tensor, taken: Tensor) -> Tensor:
    """States [n, H] of a forward a row, by the library alone."""
    states = []
    for row, prompt in enumerate(PROMPT_OF_ROW.tolist()):
        ids = torch.cat([PROMPTS[prompt], responses[row]])
        state = model.get_decoder()(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        states.append(state[len(PROMPTS[prompt]) - 1 : -1][taken[row]])
    return torch.cat(states)


def packed(model: Any, responses: Tensor, taken: Tensor, *, shared: bool) -> Tensor:
    prompts, row = (PROMPTS, PROMPT_OF_ROW) if shared else ([PROMPTS[p] for p in PROMPT_OF_ROW], torch.arange(6))
    return packing.packed_states(model.get_decoder(), lambda ids: {"input_ids": ids}, prompts, row, responses, taken)


def gradients(model: Any, states: Tensor) -> dict[str, Tensor]:
    weights = torch.linspace(-1, 1, states.numel(), dtype=states.dtype).view_as(states)
    model.zero_grad()
    (states * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_gradients_are_those_of_every_row_by_itself(family: str, shared: bool) -> None:
    model, (responses, taken) = tiny(family, FAMILIES[family]), rows()
    want = apart(model, responses, taken)
    expected = gradients(model, want)
    packing.enable(model)
    assert packing.is_enabled(model)
    got = packed(model, responses, taken, shared=shared)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    found = gradients(model, got)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():  # these libraries' norms round to fp32
        assert float((found[name] - gradient).norm() / gradient.norm()) < 1e-6, name


def test_nothing_else_changes_where_packed_rows_are_possible() -> None:
    model, (responses, taken) = tiny("llama", {}), rows()
    want = apart(model, responses, taken)
    packing.enable(model)
    assert torch.equal(apart(model, responses, taken), want)


def test_layers_that_are_recomputed_in_the_backward_pass_are_packed_there_too() -> None:
    model, (responses, taken) = tiny("llama", {}), rows()
    packing.enable(model)
    expected = gradients(model, packed(model, responses, taken, shared=True))
    for layer in model.get_decoder().layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    found = gradients(model, packed(model, responses, taken, shared=True))
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_only_what_is_read_is_computed() -> None:
    model, (responses, taken) = tiny("llama", {}), rows()
    packing.enable(model)
    seen: list[int] = []
    model.get_decoder().layers[0].mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].numel() // 16))
    packed(model, responses, taken, shared=True)
    packed(model, responses, taken, shared=False)
    fed = sum(max(0, n - 1) for n in LENGTHS)
    assert seen == [5 + 2 + 3 + fed, 5 + 5 + 2 + 3 * 3 + fed]


@pytest.mark.parametrize("family", OTHERS)
def test_models_that_cannot_take_packed_rows_are_left_alone(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model, (responses, taken) = tiny(family, OTHERS[family]), rows()
    before = model.config._attn_implementation
    want = apart(model, responses, taken)
    with caplog.at_level(logging.INFO, "mmrl.model"):
        packing.enable(model)
    assert not packing.is_enabled(model)
    assert model.config._attn_implementation == before
    assert torch.equal(apart(model, responses, taken), want)


def test_other_attention_that_was_asked_for_stays() -> None:
    model = tiny("llama", {}, "eager")
    packing.enable(model)
    assert model.config._attn_implementation == "eager"
