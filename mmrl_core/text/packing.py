"""Prompts and responses of a batch as one row without padding: every layer runs once, over tokens that count.

transformers lets attention functions be registered, and hands them whatever a forward is called with. Ours is its own
`sdpa`. For a packed row it calls that twice: for prompts among themselves, and for responses, which see their prompts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from mmrl_core.text.model_folder import Embed
from mmrl_core.text.prefix_cache import repeater

log = logging.getLogger("mmrl.model")

ATTENTION = "mmrl_packed"
"""Our attention function among those of transformers."""

HARMLESS = frozenset({"position_ids", "cache_position", "use_cache", "output_attentions"})
"""Arguments whose value changes no result. Any other (a window, a cap) asks for what packed rows do not have."""

SAME = 1e-4
"""Largest difference of a state, of the largest state. Rounding in fp32 makes 1e-5 of it in a deep model."""


class _Unpackable(Exception):
    """The model asks its attention for something that packed rows do not have."""


@dataclass(frozen=True)
class _Table:
    """Tokens [n] of rows of several lengths, one row after the other, and a table of them, padded on the right."""

    rows: int
    width: int
    places: Tensor | None
    """[n] int64: where each token stands in the flat table; None without padding."""

    @classmethod
    def of(cls, there: Tensor) -> _Table:
        """`there` [rows, width] bool: which places hold a token."""
        rows, width = there.shape
        return cls(rows, width, None if bool(there.all()) else there.flatten().nonzero()[:, 0])

    def spread(self, tokens: Tensor) -> Tensor:
        """[heads, n, d] -> [rows, heads, width, d]."""
        if self.places is not None:
            empty = tokens.new_zeros(len(tokens), self.rows * self.width, tokens.shape[-1])
            tokens = empty.index_copy(1, self.places, tokens)
        heads, _, size = tokens.shape
        return tokens.view(heads, self.rows, self.width, size).transpose(0, 1)

    def collect(self, table: Tensor) -> Tensor:
        """[rows, width, heads, d] -> [n, heads, d]."""
        flat = table.flatten(0, 1)
        return flat if self.places is None else flat.index_select(0, self.places)


@dataclass(frozen=True)
class _Packing:
    """Who belongs to whom in a row of `prompt_tokens` tokens of prompts, followed by those of responses."""

    prompts: _Table
    prompt_tokens: int
    responses: _Table
    for_rows: Callable[[Tensor], Tensor]
    """Tensors [prompts, ...] -> [b, ...]: each response's prompt."""
    mask: Tensor
    """[b or 1, 1, r, p + r] bool: the keys, of its prompt and its own, that a token of a response sees."""

    def attend(self, sdpa: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query, key, value [1, heads, n, d] -> [1, n, heads, d], with `sdpa(query, key, value, mask)`."""
        sizes = [self.prompt_tokens, query.shape[2] - self.prompt_tokens]
        # split rather than sliced: the backward of two slices is two tables of zeros and their sum
        of_prompts, of_responses = zip(*(torch.split(t[0], sizes, dim=1) for t in (query, key, value)), strict=True)
        q, prompt_keys, prompt_values = (self.prompts.spread(t) for t in of_prompts)
        attended = [self.prompts.collect(sdpa(q, prompt_keys, prompt_values, None))]  # causal; padding comes last
        if sizes[1]:
            q, k, v = (self.responses.spread(t) for t in of_responses)
            k = torch.cat([self.for_rows(prompt_keys), k], dim=2)
            v = torch.cat([self.for_rows(prompt_values), v], dim=2)
            attended.append(self.responses.collect(sdpa(q, k, v, self.mask)))
        return torch.cat(attended)[None]


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: _Packing | None = None,
    **named: Any,
) -> tuple[Tensor, None]:
    """The `sdpa` of transformers, also for packed rows: query, key, value [b, heads, n, d] -> [b, n, heads, d]."""
    library: Any = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
    if packing is None:
        plain: tuple[Tensor, None] = library(module, query, key, value, attention_mask, **named)
        return plain
    scaling, dropout = named.pop("scaling", None), named.pop("dropout", 0.0)
    if named.pop("is_causal", None) not in (None, True) or not getattr(module, "is_causal", True):
        raise _Unpackable("its attention is not causal")
    asked = sorted(name for name, asks in named.items() if asks is not None and name not in HARMLESS)
    if asked:
        raise _Unpackable(f"its attention asks for {', '.join(asked)}")

    def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        result: Tensor = library(module, q, k, v, mask, scaling=scaling, dropout=dropout)[0]
        return result

    return packing.attend(sdpa, query, key, value), None


def packed_states(
    decoder: Any,
    embed: Embed,
    prompts: Sequence[Tensor],
    prompt_of_row: Tensor,
    responses: Tensor,
    taken: Tensor,
) -> Tensor:
    """[n, H]: the state that predicts each of `responses[taken]`, in that order.

    `responses` [b, r] int64 and `taken` [b, r] bool; `prompt_of_row` [b] int64 is ascending. No token after a row's
    last taken one is computed, nor is that one: it is predicted, never read.
    """
    device = responses.device
    prompt_of_row = prompt_of_row.to(device)
    sizes = torch.tensor([len(p) for p in prompts], device=device)
    steps = torch.arange(responses.shape[1], device=device)
    fed = (taken * steps).amax(1)
    width = int(fed.max())
    is_prompt = torch.arange(int(sizes.max()), device=device) < sizes[:, None]
    is_fed = steps[:width] < fed[:, None]
    responses_begin = sizes[prompt_of_row]
    packing = _Packing(
        prompts=_Table.of(is_prompt),
        prompt_tokens=int(sizes.sum()),
        responses=_Table.of(is_fed),
        for_rows=repeater(prompt_of_row, len(prompts)),
        mask=_response_mask(is_prompt, prompt_of_row, width),
    )
    ids = torch.cat([*(p.to(device) for p in prompts), responses[:, :width][is_fed]])
    in_prompt = torch.arange(is_prompt.shape[1], device=device).expand_as(is_prompt)[is_prompt]
    in_response = (responses_begin[:, None] + steps[:width])[is_fed]
    states = decoder(
        **embed(ids[None]),
        # of four dimensions, so that the model makes none of its own
        attention_mask=torch.zeros(1, 1, 1, 1, device=device),
        position_ids=torch.cat([in_prompt, in_response])[None],
        use_cache=False,
        packing=packing,
    ).last_hidden_state[0]
    # the first token of a response is predicted by its prompt's last state, the others by the row's own
    last_of_prompt = sizes.cumsum(0)[prompt_of_row] - 1
    first_of_row = packing.prompt_tokens + fed.cumsum(0) - fed
    predicts = torch.cat([last_of_prompt[:, None], first_of_row[:, None] + steps[:-1]], dim=1)
    result: Tensor = states[predicts[taken]]
    return result


def _response_mask(is_prompt: Tensor, prompt_of_row: Tensor, width: int) -> Tensor:
    """`_Packing.mask`; one for all rows when no prompt is padded."""
    prompt = is_prompt[:1] if bool(is_prompt.all()) else is_prompt[prompt_of_row]
    causal = torch.ones(width, width, dtype=torch.bool, device=is_prompt.device).tril()
    seen = prompt[:, None, None, :].expand(-1, 1, width, -1)
    return torch.cat([seen, causal.expand(len(prompt), 1, width, width)], dim=-1)


def is_enabled(model: Any) -> bool:
    """Whether `packed_states` may be called for the decoder of `model`."""
    return bool(model.config._attn_implementation == ATTENTION)


@torch.no_grad()
def enable(model: Any) -> None:
    """Let a transformers model in fp32 take packed rows, if it attends with `sdpa` and packing changes no state.

    Others (sliding windows, layers that remember otherwise, short floats, whose rounding hides differences) stay as
    they are.
    """
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ["full_attention"]
    if model.config._attn_implementation != "sdpa" or model.dtype not in (torch.float32, torch.float64):
        return
    if set(kinds) != {"full_attention"} or not model._supports_attention_backend:
        return
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    decoder, vocabulary = model.get_decoder(), model.get_input_embeddings().num_embeddings
    ids = torch.arange(12) % vocabulary
    prompts, responses, prompt_of_row = [ids[:4], ids[4:6]], ids[3:].view(3, 3), torch.tensor([0, 0, 1])
    taken = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    rows = [torch.cat([prompts[p], r[:-1]])[None] for p, r in zip(prompt_of_row.tolist(), responses, strict=True)]
    apart = [decoder(input_ids=row, use_cache=False).last_hidden_state[0, -3:] for row in rows]
    want = torch.stack(apart)[taken]
    model.set_attn_implementation(ATTENTION)
    try:
        got = packed_states(decoder, lambda x: {"input_ids": x}, prompts, prompt_of_row, responses, taken)
        same = torch.allclose(want, got, rtol=0, atol=SAME * float(want.abs().max()))
        why = None if same else "its states would be others"
    except (_Unpackable, TypeError, ValueError, RuntimeError, IndexError) as error:  # all sorts of models
        why = str(error)
    if why is not None:
        model.set_attn_implementation("sdpa")
        log.info("%s takes no packed rows: %s", type(model).__name__, why)
