"""Samples and results through JSON: the same on the other side, or refused in words."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmrl_core.contracts import Prompt, RewardResult, Sample
from mmrl_core.errors import RewardError
from mmrl_core.rewards import wire
from mmrl_core.testing.rewards import IMAGES, VIDEOS, text_sample

FULL = Sample(
    sample_id=7,
    group_id=3,
    prompt=Prompt(
        index=5,
        messages=({"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1"}),
        answer={"values": [2, 2.5, None, True], "unit": "é \x00 \N{GRINNING FACE}"},
        columns={"level": 3, "tags": ["a", "b"], "nested": {"deep": [{"x": 1.5}]}},
        origin="data.jsonl:12",
    ),
    text="2\n\ud800",
    length=4,
    truncated=True,
    score=0.25,
)


def carried(sample: Sample, **options: Any) -> Sample:
    """Through the text of a request."""
    return wire.sample_from_json(json.loads(json.dumps(wire.sample_to_json(sample, **options), allow_nan=False)))


def test_every_field_arrives() -> None:
    assert carried(FULL) == FULL
    for of, message in ((Sample, wire.sample_to_json(FULL)), (Prompt, wire.sample_to_json(FULL)["prompt"])):
        missing = {field.name for field in fields(of)} - set(message) - {"image", "video"}
        assert not missing, "a field that the service would not see"


@pytest.mark.parametrize("sample", [*IMAGES, *VIDEOS], ids=lambda s: str(s.sample_id))
def test_pictures_arrive_bit_by_bit(sample: Sample) -> None:
    arrived = carried(sample)
    for name in ("image", "video"):
        before, after = getattr(sample, name), getattr(arrived, name)
        assert (before is None) == (after is None)
        if before is not None:
            assert after.dtype == np.uint8
            assert np.array_equal(before, after)


def test_a_video_that_is_not_contiguous_arrives() -> None:
    video = np.arange(2 * 6 * 4 * 3, dtype=np.uint8).reshape(2, 6, 4, 3)[:, ::2]
    assert np.array_equal(carried(replace(FULL, video=video)).video, video)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(answer=PLAIN, column=PLAIN)
def test_whatever_json_can_say_arrives_with_its_type(answer: Any, column: Any) -> None:
    prompt = Prompt(index=0, text="?", answer=answer, columns={"c": column})
    arrived = carried(replace(FULL, prompt=prompt)).prompt
    assert repr(arrived.answer) == repr(answer)
    assert repr(arrived.columns["c"]) == repr(column)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), b"bytes", {1: 2}, np.float32(1), {3}, [object()]])
def test_what_json_would_change_is_refused_by_name(value: Any) -> None:
    prompt = Prompt(index=0, text="?", columns={"odd": value}, origin="data.parquet:3")
    with pytest.raises(RewardError, match=r"column 'odd' of data.parquet:3 .* JSON cannot carry"):
        wire.sample_to_json(replace(FULL, prompt=prompt))
    assert carried(replace(FULL, prompt=prompt), columns=["level"]).prompt.columns == {}
    with pytest.raises(RewardError, match="reference answer"):
        wire.sample_to_json(replace(FULL, prompt=replace(prompt, answer=value)), columns=[])


def test_only_the_chosen_columns_are_sent() -> None:
    assert carried(FULL, columns=["level", "absent"]).prompt.columns == {"level": 3}


def test_a_picture_of_another_kind_is_refused() -> None:
    with pytest.raises(RewardError, match="sample 7 cannot be sent: the image is"):
        wire.sample_to_json(replace(FULL, image=np.zeros((2, 2, 3), dtype=np.float32)))


def changed(**values: Any) -> dict[str, Any]:
    return {**wire.sample_to_json(text_sample("42")), **values}


def png(width: int, height: int) -> str:
    stream = io.BytesIO()
    Image.new("1", (width, height)).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ([], "not a sample"),
        ({}, "not a sample: KeyError: 'prompt'"),
        (changed(prompt=None), "not a sample"),
        (changed(sample_id="1"), "not a whole number"),
        (changed(length=True), "not a whole number"),
        (changed(text=5), "not a text"),
        (changed(image="%%%"), "not base64"),
        (changed(image=base64.b64encode(b"GIF89a").decode()), "no PNG"),
        (changed(image=png(1 << 15, (1 << 13) + 1)), "pixels"),
        (changed(video=base64.b64encode(b"\x00" * 20).decode()), "no safetensors"),
    ],
)
def test_a_message_that_is_no_sample_is_refused(message: Any, said: str) -> None:
    with pytest.raises(RewardError, match=said):
        wire.sample_from_json(message)


def test_results_arrive() -> None:
    results = [RewardResult(value=0.1, scores={"a/b": -2.0}), RewardResult(failure="no number")]
    message = json.loads(json.dumps({"results": [wire.result_to_json(r) for r in results]}))
    assert wire.results_from_json(message, 2) == results


@pytest.mark.parametrize(
    "message",
    [
        [],
        {},
        {"results": None},
        {"results": [{"value": 1.0, "scores": {}}]},
        {"results": [{"value": "1", "scores": {}}, {"failure": "x"}]},
        {"results": [{"value": float("nan"), "scores": {}}, {"failure": "x"}]},
        {"results": [{"value": True, "scores": {}}, {"failure": "x"}]},
        {"results": [{"value": 1.0, "scores": {"a": None}}, {"failure": "x"}]},
    ],
)
def test_an_answer_that_does_not_fit_is_refused(message: Any) -> None:
    with pytest.raises(RewardError, match="results"):
        wire.results_from_json(message, 2)
