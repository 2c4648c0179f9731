"""Generation with a transformers model: prompts computed once a group, a KV cache allocated once, seeds per sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmrl_core.contracts import (
    GenerationRequest,
    LogProbSemantics,
    Policy,
    Rollouts,
    RunContext,
    TokenPolicy,
    TrainingBackend,
)
from mmrl_core.errors import RolloutError
from mmrl_core.rollouts.decoding import decode_tokens
from mmrl_core.rollouts.module_engine import ModuleEngine
from mmrl_core.text.token_rollouts import token_rollouts

if TYPE_CHECKING:
    from mmrl_core.rollouts.options import HfOptions

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.5, "float16": 0.1}
"""Largest log-prob difference between decoding and replay, by dtype. fp32: rounding of other shapes; the others:
what caching keys and values in low precision costs."""


class HfEngine(ModuleEngine):
    """Text generation on every rank; each rank is an engine replica."""

    options: HfOptions
    policy: TokenPolicy

    def setup(self, context: RunContext, policy: Policy, backend: TrainingBackend | None) -> None:
        if not isinstance(policy, TokenPolicy):
            raise RolloutError(f"rollout: hf samples tokens; the policy {type(policy).__name__} has other actions")
        super().setup(context, policy, backend)

    @property
    def semantics(self) -> LogProbSemantics:
        return LogProbSemantics(
            temperature_applied=True, truncation_renormalised=False, dtype="float32", tolerance=TOLERANCE[self.dtype]
        )

    @torch.no_grad()
    def generate(self, requests: Sequence[GenerationRequest], sampling: Any) -> Rollouts:
        with self.network() as module:
            return self._generate(module, requests, sampling)

    def _generate(self, module: nn.Module, requests: Sequence[GenerationRequest], sampling: Any) -> Rollouts:
        prompts = [self.policy.encode(r.prompt)["prompt_ids"] for r in requests]
        responses: list[Tensor] = []
        log_probs: list[Tensor] = []
        for part in _turns(requests, self.options.max_rows):
            tokens, chosen = module(
                decode_tokens,
                prompts[part],
                [len(r.seeds) for r in requests[part]],
                [seed for r in requests[part] for seed in r.seeds],
                sampling,
                self.policy.eos_ids,
                self.policy.pad_id,
            )
            responses += tokens
            log_probs += chosen
        return token_rollouts(self.policy, requests, prompts, responses, log_probs, self._version)


def _turns(requests: Sequence[GenerationRequest], max_rows: int) -> Iterator[slice]:
    """Slices of consecutive requests with at most `max_rows` samples each, at least one request."""
    start, rows = 0, 0
    for end, request in enumerate(requests):
        if rows and rows + len(request.seeds) > max_rows:
            yield slice(start, end)
            start, rows = end, 0
        rows += len(request.seeds)
    if rows:
        yield slice(start, len(requests))
