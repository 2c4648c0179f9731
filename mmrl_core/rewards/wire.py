"""Samples and results as JSON, between the reward `remote` and `mmrl serve-reward`. Imports no torch.

An image travels as a PNG file in base64, a video as the safetensors tensor `video` in base64: both exactly, and neither
can run code at the receiver.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from mmrl_core.contracts import Prompt, RewardResult, Sample
from mmrl_core.errors import MediaError, RewardError
from mmrl_core.media.images import Pixels, checked_image, checked_video

PROTOCOL = 1
"""Grows when messages change so that an older side would misread them."""
HEALTH, SCORE = "/health", "/score"
MAX_PIXELS = 1 << 28
"""Of one image: a small PNG file can unpack to any size."""


# -------------------------------------------------------------------------------------------------------------- samples


def sample_to_json(sample: Sample, columns: Sequence[str] | None = None) -> dict[str, Any]:
    """A sample as plain values; of the prompt's columns only those named, or all.

    Tuples become lists. Raises RewardError for what JSON cannot carry unchanged.
    """
    prompt = sample.prompt
    chosen = prompt.columns if columns is None else {c: prompt.columns[c] for c in columns if c in prompt.columns}
    where = f"of {prompt.origin or f'prompt {prompt.index}'}"
    message: dict[str, Any] = {
        "sample_id": sample.sample_id,
        "group_id": sample.group_id,
        "prompt": {
            "index": prompt.index,
            "messages": None if prompt.messages is None else [dict(m) for m in prompt.messages],
            "text": prompt.text,
            "answer": plain(prompt.answer, f"the reference answer {where}"),
            "columns": {name: plain(value, f"the column {name!r} {where}") for name, value in chosen.items()},
            "origin": prompt.origin,
        },
        "text": sample.text,
        "length": sample.length,
        "truncated": sample.truncated,
        "score": sample.score,
    }
    try:
        if sample.image is not None:
            message["image"] = _png(checked_image(sample.image))
        if sample.video is not None:
            pixels = np.ascontiguousarray(checked_video(sample.video))
            message["video"] = _base64(save_tensors({"video": pixels}))
    except MediaError as error:
        raise RewardError(f"sample {sample.sample_id} cannot be sent: {error}") from error
    return message


def sample_from_json(message: Any) -> Sample:
    """What `sample_to_json` made. Raises RewardError when the message is not that."""
    try:
        prompt = message["prompt"]
        messages = prompt["messages"]
        return Sample(
            sample_id=_integer(message["sample_id"]),
            group_id=_integer(message["group_id"]),
            prompt=Prompt(
                index=_integer(prompt["index"]),
                messages=None if messages is None else tuple(dict(m) for m in messages),
                text=_text(prompt["text"]),
                answer=prompt["answer"],
                columns=dict(prompt["columns"]),
                origin=str(prompt["origin"]),
            ),
            text=_text(message["text"]),
            image=_image(message["image"]) if "image" in message else None,
            video=_video(message["video"]) if "video" in message else None,
            length=_integer(message["length"]),
            truncated=bool(message["truncated"]),
            score=message["score"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RewardError(f"not a sample: {type(error).__name__}: {error}") from error


def plain(value: Any, what: str) -> Any:
    """`value` when JSON gives it back as it is, tuples aside. Raises RewardError naming `what`."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, list | tuple):
        return [plain(one, what) for one in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: plain(one, what) for key, one in value.items()}
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    shown = f"the number {value}" if isinstance(value, float) else f"a {kind}"
    raise RewardError(
        f"{what} holds {shown}, which JSON cannot carry. Leave the column out with the reward's option `columns`, or "
        "prepare the data without it"
    )


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is not a whole number")
    return value


def _text(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return value


def _png(pixels: Pixels) -> str:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", compress_level=1)
    return _base64(stream.getvalue())


def _image(text: str) -> Pixels:
    try:
        with Image.open(io.BytesIO(_bytes(text)), formats=["PNG"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise RewardError(f"an image of {image.width} x {image.height} pixels; {MAX_PIXELS} is the most")
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise RewardError(f"an image that is no PNG file: {error}") from error


def _video(text: str) -> Pixels:
    try:
        return checked_video(load_tensors(_bytes(text))["video"])
    except (SafetensorError, KeyError, MediaError) as error:
        raise RewardError(f"a video that is no safetensors tensor `video`: {error}") from error


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RewardError(f"not base64: {error}") from error


# -------------------------------------------------------------------------------------------------------------- results


def result_to_json(result: RewardResult) -> dict[str, Any]:
    """A checked result (finite numbers) as plain values."""
    if result.failure is not None:
        return {"failure": result.failure}
    return {"value": result.value, "scores": dict(result.scores)}


def results_from_json(message: Any, count: int) -> list[RewardResult]:
    """The results of an answer to `count` samples. Raises RewardError when it holds anything else."""
    try:
        results = [_result(one) for one in message["results"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RewardError(f"an answer without results: {type(error).__name__}: {error}") from error
    if len(results) != count:
        raise RewardError(f"{len(results)} results for {count} samples")
    return results


def _result(one: Any) -> RewardResult:
    if "failure" in one:
        return RewardResult(failure=str(one["failure"]))
    scores = {str(name): _number(score) for name, score in one["scores"].items()}
    return RewardResult(value=_number(one["value"]), scores=scores)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{value!r} is not a number")
    return float(value)
