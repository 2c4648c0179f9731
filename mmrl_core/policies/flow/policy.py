"""The policy `flow`: diffusion models trained by flow matching. An action is one stochastic denoising step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmrl_core.contracts import (
    ActionStats,
    Bucket,
    DenoisingPolicy,
    GenerationRequest,
    Prompt,
    Record,
    Rollouts,
    Sample,
)
from mmrl_core.errors import DataError, RecipeError
from mmrl_core.flow.embeddings import load_conditions
from mmrl_core.flow.kernels import (
    StepTable,
    gaussian_kl,
    guarded_log_prob,
    log_prob,
    mean_of,
    ode_table,
    step_table,
)
from mmrl_core.flow.schedule import linear_sigmas, network_time, trained_steps, window_start
from mmrl_core.flow.trajectory import Course, denoise, draw_noise
from mmrl_core.lora import set_adapters
from mmrl_core.policies.flow.families import choose_family
from mmrl_core.policies.flow.family import Conditions, Family
from mmrl_core.policies.flow.folder import save_folder
from mmrl_core.policies.flow.network import FlowNetwork, build, hugging_face_name

if TYPE_CHECKING:
    from mmrl_core.policies.flow.options import FlowOptions, FlowSampling
    from mmrl_core.recipe import ModelSpec

NEGATIVE = "negative."
"""Prefix of the conditions that classifier-free guidance leads away from."""

MOST_TEXTS = 256
"""Encoded prompts that are remembered; those of FLUX take 8 MB each in fp32."""

_STEP_SALT = 0x5DEECE66D
"""Sets the draw of a sample's trained steps apart from that of its noise."""


@dataclass(frozen=True, kw_only=True)
class _Table:
    """What a sampling section means for this model: levels, times and coefficients of every step."""

    sigmas: Tensor
    times: Tensor
    stochastic: StepTable
    deterministic: StepTable


@dataclass(frozen=True, kw_only=True)
class _Stacked:
    """A batch's payload with a row dimension, kept while the backend goes through its actions."""

    batch: Rollouts
    states: Tensor
    """[b, S + 1, ...], where the rollouts are."""
    means: Tensor | None
    offsets: Tensor
    """[b, T]: place of each action's state in `states`."""
    steps: Tensor
    """[b, T]."""
    conditions: Conditions
    """[b, ...] each, on the network's device."""


class FlowPolicy(DenoisingPolicy):
    """Images and video.

    Payload by row: `states` [S + 1, ...] fp32, before each of the S stochastic steps and after the last; `start`, int64
    scalar, the first of them; `steps` [T] int64, the step of the schedule that each action is; `size`, int64 [3] of
    frames, height and width; the prompt's conditions, whose tensors the rows of a group share; `means` [S, ...] with
    `log_prob: guard`.
    """

    steady_shapes = True
    options: FlowOptions
    sampling: FlowSampling

    def __init__(self, options: FlowOptions, model: ModelSpec, sampling: FlowSampling) -> None:
        super().__init__(options, model, sampling)
        self._host = torch.device("cpu")
        self._encoders: nn.Module | None = None
        self._encoder_device = self._host
        self._decoder: nn.Module | None = None
        self._encoded: OrderedDict[str, Conditions] = OrderedDict()
        self._stored_negative: tuple[Mapping[str, str], Conditions] | None = None
        self._tables: dict[FlowSampling, _Table] = {}
        self._stacked: _Stacked | None = None

    # -------------------------------------------------------------------------------------------- prompts and decoding

    def prepare(self) -> None:
        self.family: Family = choose_family(Path(self.model.path), self.options, getattr(torch, self.model.dtype))
        self.family.prepare()
        self.family.latent_shape(self.sampling)

    def encode(self, prompt: Prompt) -> dict[str, Tensor]:
        stored = prompt.columns.get("embeddings")
        if stored is None:
            return self._with_negative(self._encode_text(prompt.question(), prompt.origin), self.sampling)
        own = {name: place for name, place in stored.items() if not name.startswith(NEGATIVE)}
        negative = {name: place for name, place in stored.items() if name.startswith(NEGATIVE)}
        try:
            if not negative:
                return self._with_negative(load_conditions(own), self.sampling)
            self._check_negative_prompt(prompt.columns.get("negative_prompt"))
            return {**load_conditions(own), **self._load_negative(negative)}
        except DataError as error:
            raise DataError(f"{prompt.origin}: {error}") from error

    def _check_negative_prompt(self, stored: str | None) -> None:
        """Raises DataError when the recipe names another negative prompt than the stored embeddings were made with."""
        named = self.options.negative_prompt
        if named is None or named == stored:
            return
        theirs = "one whose text they do not say" if stored is None else repr(stored)
        raise DataError(
            f"model.policy.negative_prompt is {named!r}, but the embeddings bring their own negative prompt, {theirs}. "
            "Leave model.policy.negative_prompt out, or embed the prompts again with --negative-prompt"
        )

    def _load_negative(self, places: Mapping[str, str]) -> Conditions:
        """Conditions of the negative prompt: read once, since all prompts of a folder have the same."""
        if self._stored_negative is None or self._stored_negative[0] != places:
            self._stored_negative = (dict(places), load_conditions(places))
        return self._stored_negative[1]

    def _with_negative(self, conditions: Mapping[str, Tensor], sampling: FlowSampling) -> Conditions:
        """The conditions, with those of the negative prompt where guidance needs them and without them elsewhere."""
        if sampling.cfg_scale == 1.0:
            return {name: value for name, value in conditions.items() if not name.startswith(NEGATIVE)}
        if any(name.startswith(NEGATIVE) for name in conditions):
            return dict(conditions)
        negative = self._encode_text(self.options.negative_prompt or "", "model.policy.negative_prompt")
        return {**conditions, **{NEGATIVE + name: value for name, value in negative.items()}}

    def _encode_text(self, text: str, origin: str) -> Conditions:
        """Conditions of a text; the last MOST_TEXTS are remembered."""
        if text in self._encoded:
            self._encoded.move_to_end(text)
            return self._encoded[text]
        if self._encoders is None:
            self._encoders = self.family.load_encoders().eval().requires_grad_(False).to(self._encoder_device)
        try:
            with torch.no_grad():
                self._encoded[text] = self.family.encode(self._encoders, [text])[0]
        except DataError as error:
            raise DataError(f"{origin}: {error}") from error
        if len(self._encoded) > MOST_TEXTS:
            self._encoded.popitem(last=False)
        return self._encoded[text]

    @contextmanager
    def text_encoders(self, device: torch.device) -> Iterator[None]:
        self._encoder_device = device
        if self._encoders is not None:
            self._encoders.to(device)
        try:
            yield
        finally:
            self._encoder_device = self._host
            if self._encoders is not None:
                self._encoders.to(self._host)

    @contextmanager
    def decoder(self, device: torch.device, *, tiling: bool) -> Iterator[None]:
        if self._decoder is None:
            self._decoder = self.family.load_decoder().eval().requires_grad_(False)
        switch = getattr(self._decoder, "enable_tiling" if tiling else "disable_tiling", None)
        if switch is not None:
            switch()
        self._decoder.to(device)
        try:
            yield
        finally:
            self._decoder.to(self._host)

    @torch.no_grad()
    def decode(self, rollouts: Rollouts, requests: Sequence[GenerationRequest]) -> list[Sample]:
        if not len(rollouts):
            return []
        with nullcontext() if self._decoder is not None else self.decoder(self._host, tiling=False):
            assert self._decoder is not None
            frames, height, width = rollouts.payload["size"][0].tolist()
            sampling = self.sampling.model_copy(update={"frames": frames, "height": height, "width": width})
            pixels = self.family.decode(self._decoder, torch.stack(rollouts.payload["final"]), sampling)
        prompts = {r.group_id: r.prompt for r in requests}
        kind = "video" if pixels.ndim == 5 else "image"
        return [
            Sample(
                sample_id=int(sample_id),
                group_id=int(group_id),
                prompt=prompts[int(group_id)],
                length=int(length),
                **{kind: pixels[row]},
            )
            for row, (sample_id, group_id, length) in enumerate(
                zip(rollouts.sample_id, rollouts.group_id, rollouts.mask.sum(-1), strict=True)
            )
        ]

    # ------------------------------------------------------------------------------------------------------- sampling

    def _table(self, sampling: FlowSampling) -> _Table:
        if sampling not in self._tables:
            model = sampling.schedule == "model"
            sigmas = self.family.schedule(sampling) if model else linear_sigmas(sampling.steps, sampling.shift)
            self._tables[sampling] = _Table(
                sigmas=sigmas,
                times=network_time(sigmas, quantise=sampling.quantise_time),
                stochastic=step_table(sigmas, sampling.kernel, sampling.noise),
                deterministic=ode_table(sigmas),
            )
        return self._tables[sampling]

    @torch.no_grad()
    def trajectories(
        self,
        module: nn.Module,
        requests: Sequence[GenerationRequest],
        conditions: Sequence[Mapping[str, Tensor]],
        sampling: FlowSampling,
        device: torch.device,
    ) -> Rollouts:
        shape = self.family.latent_shape(sampling)
        rows = [(group, seed) for group, request in enumerate(requests) for seed in request.seeds]
        seeds = [seed for _, seed in rows]
        stochastic = sampling.stochastic_steps() if sampling.noise > 0 else 0
        first, last = sampling.stochastic_range()
        group_starts = [window_start(first, last, stochastic, r.group_seed) if stochastic else 0 for r in requests]
        starts = torch.tensor([group_starts[group] for group, _ in rows], dtype=torch.int64)
        if sampling.same_initial_noise:
            initial = draw_noise([r.group_seed for r in requests], 1, shape)[[group for group, _ in rows], 0]
            noise = draw_noise(seeds, stochastic, shape)
        else:
            both = draw_noise(seeds, stochastic + 1, shape)
            initial, noise = both[:, 0], both[:, 1:]
        shared = sampling.same_initial_noise and self.options.share_start
        complete = [self._with_negative(one, sampling) for one in conditions]
        by_row = {name: [complete[group][name] for group, _ in rows] for name in (complete[0] if complete else {})}
        stacked = _stack_conditions(by_row, device)
        table = self._table(sampling)

        def velocity(latents: Tensor, time: Tensor, some: Tensor | None) -> Tensor:
            if not rows:  # an idle replica; within `inference_module` forwards are nobody else's business
                return latents
            theirs = stacked if some is None else {name: value[some] for name, value in stacked.items()}
            result: Tensor = module(self._velocity, latents, time, theirs, sampling, sampling.cfg_scale > 1)
            return result

        course = Course(
            sigmas=table.sigmas,
            times=table.times,
            stochastic=table.stochastic,
            deterministic=table.deterministic,
            kernel=sampling.kernel,
            starts=starts,
            length=stochastic,
            guard=sampling.log_prob == "guard",
            alike=torch.tensor([group for group, _ in rows], dtype=torch.int64) if shared else None,
        )
        done = denoise(velocity, initial.to(device), noise, course)
        places = torch.zeros((len(rows), 0), dtype=torch.int64)
        if stochastic:
            salted = [seed ^ _STEP_SALT for seed in seeds]
            places = trained_steps(stochastic, sampling.trained_steps(), salted, permute=sampling.permute_steps)
        payload: Record = {
            "states": list(done.states),
            "start": list(starts),
            "steps": list(starts[:, None] + places),
            "final": list(done.final),
            "size": [torch.tensor([sampling.frames, sampling.height, sampling.width])] * len(rows),
            **by_row,
        }
        if done.means is not None:
            payload["means"] = list(done.means)
        return Rollouts(
            group_id=torch.tensor([r.group_id for r in requests for _ in r.seeds], dtype=torch.int64),
            sample_id=torch.tensor([s for r in requests for s in r.sample_ids], dtype=torch.int64),
            mask=torch.ones(places.shape, dtype=torch.bool),
            behaviour_log_probs=done.log_probs.gather(1, places),
            truncated=torch.zeros(len(rows), dtype=torch.bool),
            policy_version=0,
            payload=payload,
        )

    def _velocity(
        self,
        network: nn.Module,
        latents: Tensor,
        time: Tensor,
        conditions: Conditions,
        sampling: FlowSampling,
        guided: bool,
    ) -> Tensor:
        """[b, ...] fp32; with classifier-free guidance both velocities in one forward."""
        positive = {name: value for name, value in conditions.items() if not name.startswith(NEGATIVE)}
        if not guided:
            return self.family.velocity(network, latents, time, positive, sampling)
        both = {name: torch.cat([value, conditions[NEGATIVE + name]]) for name, value in positive.items()}
        twice = self.family.velocity(network, torch.cat([latents, latents]), torch.cat([time, time]), both, sampling)
        wanted, unwanted = twice.chunk(2)
        return unwanted + sampling.cfg_scale * (wanted - unwanted)

    # --------------------------------------------------------------------------------------------------------- replay

    def replay(
        self,
        module: nn.Module,
        batch: Rollouts,
        *,
        actions: slice = slice(None),
        entropy_gradient: bool = False,
        reference: Record | None = None,
        plan: int = 0,
    ) -> ActionStats:
        if entropy_gradient:
            raise RecipeError(
                "algorithm.loss.entropy_coef: the entropy of a denoising step does not depend on the network; set it "
                "to 0 for the policy flow, and sampling.noise for more exploration"
            )
        stacked = self._stack(module, batch)
        sampling, table = self.sampling, self._table(self.sampling).stochastic
        steps = stacked.steps[:, actions]
        shape, flat = steps.shape, steps.flatten()
        mean, rows, places = self._means(module, stacked, actions)
        std = table.std[flat].float().to(mean.device)
        following = stacked.states[rows, places + 1].to(mean.device)
        weight: Tensor | None = None
        if stacked.means is not None:
            recorded = stacked.means[rows, places].to(mean.device)
            log_probs = guarded_log_prob(following, mean, std, recorded)
            weight = (1.0 / table.size[flat]).float().to(mean.device).view(shape)
        else:
            log_probs = log_prob(sampling.kernel, following, mean, std)
        divergence: Tensor | None = None
        if reference is not None:
            frozen = torch.stack([means[actions] for means in reference["means"]]).flatten(0, 1)
            divergence = gaussian_kl(mean, frozen.to(mean.device), std).view(shape)
        return ActionStats(log_probs=log_probs.view(shape), kl=divergence, weight=weight)

    def _means(self, module: nn.Module, stacked: _Stacked, actions: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Means [b t, ...] of the next states, and of each its row and place in the recorded states."""
        table = self._table(self.sampling)
        flat = stacked.steps[:, actions].flatten()
        places = stacked.offsets[:, actions].flatten()
        count = flat.shape[0] // max(1, stacked.steps.shape[0])
        rows = torch.arange(stacked.steps.shape[0]).repeat_interleave(count)
        conditions = stacked.conditions
        device = next(module.parameters()).device
        if count > 1:
            index = rows.to(device)
            conditions = {name: value[index] for name, value in conditions.items()}
        states = stacked.states[rows, places].to(device)
        time = table.times[flat].to(device)
        guided = self.sampling.cfg_scale > 1 and self.sampling.cfg_in_replay
        velocity = module(self._velocity, states, time, conditions, self.sampling, guided)
        of_x, of_v = table.stochastic.of_x[flat].float(), table.stochastic.of_v[flat].float()
        return mean_of(of_x, of_v, states, velocity), rows, places

    def _stack(self, module: nn.Module, batch: Rollouts) -> _Stacked:
        """The batch's payload stacked; computed once for all slices of one batch."""
        if self._stacked is None or self._stacked.batch is not batch:
            payload = batch.payload
            steps = torch.stack(payload["steps"])
            known = {"states", "start", "steps", "means", "final", "size"}
            self._stacked = _Stacked(
                batch=batch,
                states=torch.stack(payload["states"]),
                means=torch.stack(payload["means"]) if "means" in payload else None,
                offsets=steps - torch.stack(payload["start"])[:, None],
                steps=steps,
                conditions=_stack_conditions(
                    {name: values for name, values in payload.items() if name not in known},
                    next(module.parameters()).device,
                ),
            )
        return self._stacked

    @torch.no_grad()
    def reference_record(self, module: nn.Module, batch: Rollouts, *, plan: int = 0) -> Record:
        stacked = self._stack(module, batch)
        rows, count = stacked.steps.shape
        parts = []
        for part in self.action_slices(count):
            means = self._means(module, stacked, part)[0]
            parts.append(means.view(rows, -1, *means.shape[1:]).cpu())
        return {"means": list(torch.cat(parts, dim=1))}

    @contextmanager
    def reference_network(self, module: nn.Module) -> Iterator[None]:
        set_adapters(module, enabled=False)
        try:
            yield
        finally:
            set_adapters(module, enabled=True)

    @property
    def max_actions(self) -> int:
        return self.sampling.trained_steps()

    def action_slices(self, count: int) -> Sequence[slice]:
        width = self.options.steps_at_once
        return [slice(first, min(first + width, count)) for first in range(0, count, width)]

    # ---------------------------------------------------------------------------------------------------- the network

    def load(self, dtype: torch.dtype, *, adapters: bool = True) -> nn.Module:
        return build(self.family, self.model, dtype, adapters=adapters)

    def shard_units(self, module: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(module, FlowNetwork)
        return self.family.blocks(module.network)

    def weight_name(self, parameter: str) -> str:
        return hugging_face_name(parameter)

    def save_weights(self, directory: Path, weights: Iterable[Bucket]) -> None:
        save_folder(directory, weights, self.family, getattr(torch, self.model.dtype))


def _stack_conditions(by_row: Mapping[str, Sequence[Tensor]], device: torch.device) -> Conditions:
    """[b, ...] each. Raises DataError when prompts were encoded to different lengths."""
    stacked: Conditions = {}
    for name, values in by_row.items():
        shapes = {tuple(value.shape) for value in values}
        if len(shapes) > 1:
            raise DataError(
                f"prompt embeddings {name!r} have different shapes {sorted(shapes)} in one batch; encode all prompts "
                "with the same number of text tokens (mmrl data embed --max-text-tokens)"
            )
        if shapes:
            stacked[name] = torch.stack(list(values)).to(device)
    return stacked
