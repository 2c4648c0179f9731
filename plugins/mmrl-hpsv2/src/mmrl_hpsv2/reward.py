"""`hpsv2`: how well an image fits its prompt, as people judge it (Human Preference Score v2, arXiv:2306.09341)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmrl_core.contracts import Reward, RewardResult, Sample
from mmrl_core.errors import RewardError
from mmrl_hpsv2.checkpoint import read_checkpoint
from mmrl_hpsv2.network import build, image_features, renamed, shape_of, text_features
from mmrl_hpsv2.options import HpsV2Options
from mmrl_hpsv2.pixels import to_pixels
from mmrl_hpsv2.prompts import Prompts

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class HpsV2(Reward):
    """The cosine between the image's and the prompt's features, times `scale`; about 0.2 to 0.35 with the published
    checkpoints. No logit scale is applied.

    A sample's image counts when it has one, else its video, as the options say.
    """

    options: HpsV2Options

    def setup(self, device: str) -> None:
        """Read the checkpoint and the tokenizer. The network stays on the host until `onload`. Raises RewardError."""
        options = self.options
        self._device = torch.device(device)
        path = Path(options.checkpoint).expanduser()
        state = read_checkpoint(path)
        shape = shape_of(state, path, vision_head_width=options.vision_head_width, text_heads=options.text_heads)
        weights = renamed(state, path, shape, _DTYPES[options.dtype])
        self._prompts = Prompts(
            Path(options.tokenizer).expanduser(),
            vocabulary=shape.vocabulary,
            context=shape.context,
            fix_text=options.fix_text,
        )
        self._size = shape.image
        self._network = build(shape, weights)

    def onload(self) -> None:
        """Bring the network to the device."""
        self._network.to(self._device)

    def offload(self) -> None:
        """Bring the network back to the host and return the device's cached memory."""
        self._network.to("cpu")
        release = getattr(torch.get_device_module(self._device), "empty_cache", None)
        if release is not None:
            release()

    @torch.inference_mode()
    def score(self, samples: Sequence[Sample]) -> list[RewardResult]:
        """One result a sample; one that has no readable image or video has failed."""
        failures: dict[int, str] = {}
        frames: list[tuple[int, Any]] = []
        for row, sample in enumerate(samples):
            try:
                frames.extend((row, frame) for frame in self._frames(sample))
            except RewardError as error:
                failures[row] = str(error)
        values: list[list[float]] = [[] for _ in samples]
        for row, value in self._similarities(samples, frames, failures):
            values[row].append(value)
        return [
            RewardResult(failure=failures[row]) if row in failures else self._result(found)
            for row, found in enumerate(values)
        ]

    def _frames(self, sample: Sample) -> list[Any]:
        """What is scored of a sample: at least one image. Raises RewardError."""
        if sample.image is not None:
            return [sample.image]
        if sample.video is None:
            raise RewardError("the sample has neither an image nor a video; hpsv2 scores images and video only")
        video = sample.video
        if not isinstance(video, np.ndarray) or video.ndim != 4 or len(video) == 0:
            found = list(video.shape) if isinstance(video, np.ndarray) else type(video).__name__
            raise RewardError(f"the video is {found}; it must be a uint8 array [frames, H, W, 3] with a frame at least")
        return list(video[:1] if self.options.video == "first" else video[:: self.options.every])

    def _similarities(
        self, samples: Sequence[Sample], frames: Sequence[tuple[int, Any]], failures: dict[int, str]
    ) -> Iterator[tuple[int, float]]:
        """(row, cosine) of every frame. A frame that cannot be read is put into `failures` instead."""
        if not frames:
            return
        questions = [sample.prompt.question() for sample in samples]
        distinct = {question: i for i, question in enumerate(dict.fromkeys(questions))}  # a group shares its prompt
        texts = text_features(self._network, self._prompts.encode(list(distinct)))
        step = self.options.images_per_forward
        for first in range(0, len(frames), step):
            rows, pixels = [], []
            for row, frame in frames[first : first + step]:
                try:
                    pixels.append(to_pixels(frame, self._size))
                    rows.append(row)
                except RewardError as error:
                    failures[row] = str(error)
            if rows:
                images = image_features(self._network, torch.stack(pixels).to(self._device))
                cosines = (images * texts[[distinct[questions[row]] for row in rows]]).sum(dim=-1)
                yield from zip(rows, cosines.tolist(), strict=True)

    def _result(self, values: Sequence[float]) -> RewardResult:
        value = self.options.scale * sum(values) / len(values)
        if not math.isfinite(value):
            return RewardResult(failure=f"the score is {value}; a checkpoint or a dtype that overflows gives that")
        return RewardResult(value=value)
