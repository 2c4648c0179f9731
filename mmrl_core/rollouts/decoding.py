"""The token loop of the transformers engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from mmrl_core.text.model_folder import head
from mmrl_core.text.prefix_cache import PromptRecorder
from mmrl_core.text.token_batches import left_pad

COMPACT_BELOW = 0.75
"""Finished rows leave the batch when fewer than this fraction are still running: leaving costs a copy of the cache."""


class _Slab(DynamicLayer):  # type: ignore[misc]
    """Keys and values in one allocation for all tokens to come; appending copies only the new ones."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.used = 0

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Start from a prompt's keys and values [rows, heads, prompt, head_dim]."""
        self.used = keys.shape[2]
        shape = (keys.shape[0], keys.shape[1], self.capacity, keys.shape[3])
        self.key_slab = keys.new_empty(shape)
        self.value_slab = values.new_empty((*shape[:3], values.shape[3]))
        self.key_slab[:, :, : self.used] = keys
        self.value_slab[:, :, : self.used] = values
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        end = self.used + key_states.shape[2]
        self.key_slab[:, :, self.used : end] = key_states
        self.value_slab[:, :, self.used : end] = value_states
        self.used = end
        return self.key_slab[:, :, :end], self.value_slab[:, :, :end]

    def get_seq_length(self) -> int:
        return self.used

    def keep(self, rows: Tensor) -> None:
        """Drop the other rows."""
        self.key_slab, self.value_slab = self.key_slab[rows], self.value_slab[rows]


def decode_tokens(
    model: Any,
    prompts: Sequence[Tensor],
    group_sizes: Sequence[int],
    seeds: Sequence[int],
    sampling: Any,
    eos_ids: frozenset[int],
    pad_id: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """Sample `group_sizes[i]` responses to prompt i.

    Returns (token ids, log-probs), one pair of [R] CPU tensors a sample: response tokens up to and including the end
    token. Log-probs are of the full softmax at the sampling temperature (1 when greedy), fp32, not renormalised after
    top-p, top-k or min-p, so that they compare with replayed ones. Each sample draws its uniform numbers from its own
    seed on the CPU: the same on every device, batching and number of ranks.
    """
    device = next(model.parameters()).device
    decoder, to_logits = model.get_decoder(), head(model)
    limit = sampling.max_new_tokens
    ids, prompt_mask = left_pad(prompts, pad_id)
    row_prompt = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(group_sizes)).to(device)
    recorder = PromptRecorder(len(decoder.layers))
    positions = (prompt_mask.cumsum(-1) - 1).clamp_min(0)
    hidden = decoder(
        input_ids=ids.to(device),
        attention_mask=prompt_mask.to(device),
        position_ids=positions.to(device),
        past_key_values=recorder,
        use_cache=True,
    ).last_hidden_state[:, -1]
    logits = to_logits(hidden)[row_prompt]
    slabs = [_Slab(ids.shape[1] + limit) for _ in recorder.layers]
    for slab, layer in zip(slabs, recorder.layers, strict=True):
        slab.fill(*(t[row_prompt] for t in layer.recorded))
    cache = Cache(layers=slabs)
    rows = len(seeds)
    padded = bool((prompt_mask == 0).any())
    mask = nn.functional.pad(prompt_mask.to(device)[row_prompt], (0, limit), value=1)
    position = positions.to(device)[row_prompt, -1:]
    uniform = torch.stack([torch.rand(limit, generator=torch.Generator().manual_seed(s)) for s in seeds]).to(device)
    stops = torch.tensor(sorted(eos_ids), device=device)
    tokens = torch.full((rows, limit), pad_id, dtype=torch.int64, device=device)
    chosen = torch.zeros(rows, limit, device=device)
    lengths = torch.full((rows,), limit, dtype=torch.int64, device=device)
    alive = torch.arange(rows, device=device)  # which sample each row of the batch is
    running = torch.ones(rows, dtype=torch.bool, device=device)
    for step in range(limit):
        token, log_prob = choose(logits, uniform[alive, step], sampling)
        tokens[alive, step] = torch.where(running, token, pad_id)
        chosen[alive, step] = torch.where(running, log_prob, 0.0)
        if not sampling.ignore_eos:
            ended = running & torch.isin(token, stops)
            lengths[alive] = torch.where(ended, step + 1, lengths[alive])
            running = running & ~ended
        if step + 1 == limit or not bool(running.any()):
            break
        if running.sum() < COMPACT_BELOW * len(running):
            alive, token, mask, position = alive[running], token[running], mask[running], position[running]
            for slab in slabs:
                slab.keep(running)
            running = running[running]
        position = position + 1
        hidden = decoder(
            input_ids=token[:, None],
            attention_mask=mask[:, : slabs[0].used + 1] if padded else None,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        logits = to_logits(hidden)
    tokens, chosen = tokens.cpu(), chosen.cpu()
    sizes = lengths.tolist()
    return [t[:n].clone() for t, n in zip(tokens, sizes, strict=True)], [
        c[:n].clone() for c, n in zip(chosen, sizes, strict=True)
    ]


def choose(logits: Tensor, uniform: Tensor, sampling: Any) -> tuple[Tensor, Tensor]:
    """One token a row by inverting the cumulative distribution at `uniform` [n]; its log-prob under the full softmax.

    `logits` [n, V]. Temperature 0 takes the likeliest token.
    """
    scaled = logits.float()
    if sampling.temperature not in (0.0, 1.0):
        scaled = scaled / sampling.temperature
    log_probs = scaled.log_softmax(-1)
    if sampling.temperature == 0:
        token = log_probs.argmax(-1)
    else:
        p = truncate(log_probs.exp(), sampling)
        cumulative = p.cumsum(-1)
        total = cumulative[:, -1:].contiguous()
        token = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)[:, 0]
        # uniform * total can round up to the total: then the last token with any probability is meant, the first
        # that reaches the total
        token = torch.minimum(token, torch.searchsorted(cumulative, total)[:, 0])
    return token, log_probs.gather(-1, token[:, None])[:, 0]


def truncate(p: Tensor, sampling: Any) -> Tensor:
    """`p` [n, V] with the tokens that top-k, top-p and min-p exclude set to 0 (not renormalised)."""
    if sampling.min_p > 0:
        p = p.where(p >= sampling.min_p * p.amax(-1, keepdim=True), 0.0)
    if sampling.top_k:
        kth = p.topk(min(sampling.top_k, p.shape[-1])).values[:, -1:]
        p = p.where(p >= kth, 0.0)
    if sampling.top_p < 1:
        ordered, order = p.sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.where(before < sampling.top_p * ordered.sum(-1, keepdim=True), 0.0)
        p = torch.zeros_like(p).scatter(-1, order, ordered)
    return p
