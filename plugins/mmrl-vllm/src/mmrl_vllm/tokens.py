"""Between mmrl's sampling options and vLLM's, and back from its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmrl_core.errors import RolloutError

COLDEST = 0.01
"""vLLM raises lower temperatures to this one, except 0."""


def sampling_params(sampling: Any, eos_ids: frozenset[int], seed: int) -> Any:
    """vLLM's `SamplingParams` of one sample.

    The tokens that end a response are given by number, so that nothing depends on what vLLM reads from the model's
    folder. Raises RolloutError for temperatures that vLLM would change.
    """
    from vllm import SamplingParams

    if 0 < sampling.temperature < COLDEST:
        raise RolloutError(
            f"sampling.temperature {sampling.temperature}: vLLM samples at {COLDEST} instead. Use 0 (greedy), "
            f"{COLDEST} or more"
        )
    return SamplingParams(
        n=1,
        seed=seed,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k or -1,
        min_p=sampling.min_p,
        max_tokens=sampling.max_new_tokens,
        logprobs=0,  # of the chosen token only
        stop_token_ids=[] if sampling.ignore_eos else sorted(eos_ids),
        ignore_eos=True,
        detokenize=False,
    )


def responses(outputs: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Token ids and log-probs of vLLM's outputs, one pair of [R] CPU tensors (int64, fp32) a sample."""
    tokens: list[Tensor] = []
    log_probs: list[Tensor] = []
    for output in outputs:
        (completion,) = output.outputs
        ids = [int(token) for token in completion.token_ids]
        chosen = [float(of[token].logprob) for token, of in zip(ids, completion.logprobs, strict=True)]
        if completion.finish_reason not in ("stop", "length"):
            raise RolloutError(f"vLLM ended a response early: {completion.finish_reason}")
        tokens.append(torch.tensor(ids, dtype=torch.int64))
        log_probs.append(torch.tensor(chosen, dtype=torch.float32))
    return tokens, log_probs
