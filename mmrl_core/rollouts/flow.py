"""Images and video by denoising, with the live network; text encoders and VAE are on the device only while needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from mmrl_core.contracts import (
    DenoisingPolicy,
    GenerationRequest,
    LogProbSemantics,
    Policy,
    Rollouts,
    RunContext,
    Sample,
    TrainingBackend,
)
from mmrl_core.errors import RecipeError, RolloutError
from mmrl_core.rollouts.module_engine import ModuleEngine
from mmrl_core.rows import concatenate, select_rows

if TYPE_CHECKING:
    from mmrl_core.rollouts.options import FlowEngineOptions

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.05}
"""Largest log-prob difference between sampling and replay, by dtype: what other batch shapes cost in rounding."""


class FlowEngine(ModuleEngine):
    """Denoising on every rank; each rank is an engine replica."""

    options: FlowEngineOptions
    policy: DenoisingPolicy

    def setup(self, context: RunContext, policy: Policy, backend: TrainingBackend | None) -> None:
        if not isinstance(policy, DenoisingPolicy):
            raise RolloutError(f"rollout: flow denoises; the policy {type(policy).__name__} has other actions")
        if backend is not None and policy.sampling.noise == 0:
            raise RecipeError("sampling.noise: 0 leaves nothing to chance and so nothing to learn from; raise it")
        super().setup(context, policy, backend)

    @property
    def semantics(self) -> LogProbSemantics:
        return LogProbSemantics(
            temperature_applied=False,
            truncation_renormalised=False,
            dtype="float32",
            tolerance=TOLERANCE[self.dtype],
        )

    @torch.no_grad()
    def generate(self, requests: Sequence[GenerationRequest], sampling: Any) -> Rollouts:
        device = self.context.device.torch_device
        with self.policy.text_encoders(device):
            conditions = [self.policy.encode(r.prompt) for r in requests]
        self._free()
        with self.network() as module:
            parts = [
                self.policy.trajectories(module, part, [conditions[i] for i in places], sampling, device)
                for places, part in _turns(requests, self.options.max_rows)
            ]
        rollouts = concatenate(parts)
        rollouts.policy_version = self._version
        self._free()
        rollouts.samples = self._decoded(rollouts, requests, device)
        rollouts.payload.pop("final", None)
        return rollouts

    def _decoded(self, rollouts: Rollouts, requests: Sequence[GenerationRequest], device: torch.device) -> list[Sample]:
        samples: list[Sample] = []
        place = self.policy.decoder(device, tiling=self.options.vae_tiling) if len(rollouts) else nullcontext()
        with place:
            for first in range(0, len(rollouts), self.options.decode_rows):
                rows = list(range(first, min(first + self.options.decode_rows, len(rollouts))))
                samples += self.policy.decode(select_rows(rollouts, rows), requests)
        self._free()
        return samples

    def _free(self) -> None:
        """Give back what encoders and VAE held; nothing to do where host and device are one."""
        if self.context.device.torch_device.type != "cpu":
            self.context.device.empty_cache()


def _turns(requests: Sequence[GenerationRequest], max_rows: int) -> Iterator[tuple[list[int], list[GenerationRequest]]]:
    """(indices of requests, requests of their samples) with at most `max_rows` samples each; one empty turn of none.

    A group may be cut: its rows share their prompt's conditions and `group_seed`, not a computation.
    """
    places: list[int] = []
    turn: list[GenerationRequest] = []
    rows = 0
    for place, request in enumerate(requests):
        first = 0
        while first < len(request.seeds):
            count = min(max_rows - rows, len(request.seeds) - first)
            part = slice(first, first + count)
            places.append(place)
            turn.append(replace(request, sample_ids=request.sample_ids[part], seeds=request.seeds[part]))
            first, rows = first + count, rows + count
            if rows == max_rows:
                yield places, turn
                places, turn, rows = [], [], 0
    if turn or not requests:
        yield places, turn
