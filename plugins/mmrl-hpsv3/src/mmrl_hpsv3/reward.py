"""The reward: images or video frames and their prompts -> HPSv3's mu."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call

from mmrl_core import Reward, RewardResult, Sample
from mmrl_core.errors import MediaError, RewardError
from mmrl_hpsv3.base import load_base
from mmrl_hpsv3.checkpoint import open_checkpoint
from mmrl_hpsv3.inputs import Row, collate, encode
from mmrl_hpsv3.network import load_network
from mmrl_hpsv3.options import HpsV3Options
from mmrl_hpsv3.pictures import UnusableSampleError, pictures


class HpsV3(Reward):
    """`scale` times HPSv3's mu of the image, or of the video's frames, given the prompt's question.

    Sub-scores: `mu`, and `sigma` as HPSv3 returns it, which is the logarithm of the standard deviation.
    """

    options: HpsV3Options
    batch_size = 8

    def setup(self, device: str) -> None:
        """Load weights into host memory; they come to `device` with `onload`. Raises RewardError."""
        try:
            self._device = torch.device(device)
        except RuntimeError as error:
            raise RewardError(f"hpsv3: {device!r} is no torch device: {error}") from error
        asked = self.options.dtype
        on_host = self._device.type == "cpu"
        dtype = torch.float32 if asked == "float32" or (asked == "auto" and on_host) else torch.bfloat16
        checkpoint = open_checkpoint(Path(self.options.checkpoint).expanduser())
        self._base = load_base(Path(self.options.base).expanduser())
        self._network = load_network(self._base, checkpoint, dtype)
        self._host = {**dict(self._network.named_parameters()), **dict(self._network.named_buffers())}
        self._loaded: dict[str, Tensor] | None = None

    def onload(self) -> None:
        """Copy the weights to the device. The host keeps its own, so that `offload` copies nothing back."""
        if self._loaded is None:
            self._loaded = {name: tensor.to(self._device) for name, tensor in self._host.items()}

    def offload(self) -> None:
        """Give the device's memory back."""
        self._loaded = None
        if self._device.type != "cpu":
            empty_cache = getattr(torch.get_device_module(self._device), "empty_cache", None)
            if empty_cache is not None:
                empty_cache()

    def score(self, samples: Sequence[Sample]) -> list[RewardResult]:
        """One result a sample, in order. A sample that HPSv3 cannot take has failed; the others have not."""
        self.onload()
        encoded = [self._encode(sample) for sample in samples]
        rows = [row for answer in encoded if isinstance(answer, list) for row in answer]
        logits = iter(self._logits(rows, at_once=max(1, len(samples))))
        return [
            self._result([next(logits) for _ in answer]) if isinstance(answer, list) else RewardResult(failure=answer)
            for answer in encoded
        ]

    def _encode(self, sample: Sample) -> list[Row] | str:
        """The sample's images with its prompt, or why it has failed."""
        prompt = sample.prompt.question()
        try:
            return [encode(self._base, image, prompt) for image in pictures(sample, self.options)]
        except (UnusableSampleError, MediaError) as error:
            return str(error)

    @torch.inference_mode()
    def _logits(self, rows: Sequence[Row], at_once: int) -> list[tuple[float, float]]:
        """(mu, sigma) of every row; no more than `at_once` images are on the device together."""
        assert self._loaded is not None
        answers: list[tuple[float, float]] = []
        for start in range(0, len(rows), at_once):
            inputs = collate(rows[start : start + at_once], self._base.pad_id)
            there = replace(inputs, **{name: tensor.to(self._device) for name, tensor in vars(inputs).items()})
            logits = functional_call(self._network, self._loaded, (there,))
            answers += [(mu, sigma) for mu, sigma in logits.tolist()]
        return answers

    def _result(self, logits: Sequence[tuple[float, float]]) -> RewardResult:
        mu = sum(mu for mu, _ in logits) / len(logits)
        sigma = sum(sigma for _, sigma in logits) / len(logits)
        if not (math.isfinite(mu) and math.isfinite(sigma)):
            return RewardResult(failure=f"HPSv3 returned mu {mu} and sigma {sigma}")
        return RewardResult(value=self.options.scale * mu, scores={"mu": mu, "sigma": sigma})
