"""The comparison with peers refuses unequal work, and notices a peer that ends. Not timed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from peers.channel import DriverSide, PeerError
from peers.pairs import Spread, summary
from peers.questions import length, write_questions
from peers.text_trl import check_alike, check_same_work

from mmrl_core.testing.tiny import byte_tokenizer

JOB = {"prompts_per_step": 1, "samples_per_prompt": 2, "tokens": 3}
FACTS: dict[str, Any] = {
    "threads": 1,
    "dtypes": ["torch.float32"],
    "versions": {"torch": "2.13.0+cpu", "transformers": "5.9.0"},
}


def answer(**changes: Any) -> dict[str, Any]:
    return {"prompts": [[1, 2], [1, 2]], "response_tokens": [3, 3], "updates": 4, "seconds": 1.0, **changes}


def test_equal_work_is_accepted() -> None:
    check_same_work({"ours": answer(), "trl": answer()}, 4, JOB)
    check_alike({"ours": FACTS, "trl": {**FACTS, "versions": {"torch": "2.13.0", "transformers": "5.9.0"}}}, 1)


@pytest.mark.parametrize(
    "changes", [{"response_tokens": [3, 2]}, {"response_tokens": [3]}, {"updates": 8}, {"prompts": [[1, 2], [1, 3]]}]
)
def test_unequal_work_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(PeerError, match="step 4"):
        check_same_work({"ours": answer(), "trl": answer(**changes)}, 4, JOB)


@pytest.mark.parametrize(
    "changes",
    [{"threads": 2}, {"dtypes": ["torch.bfloat16"]}, {"versions": {"torch": "2.12.0", "transformers": "5.9.0"}}],
)
def test_unlike_sides_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(SystemExit):
        check_alike({"ours": FACTS, "trl": {**FACTS, **changes}}, 1)


ECHO = """
from peers.channel import PeerSide
channel = PeerSide()
print("noise of a library on stdout")
channel.send({"ready": {}})
while (step := channel.wait()) is not None:
    if step == 3:
        raise SystemExit("out of luck")
    channel.send({"seconds": float(step)})
"""


def test_peer_takes_turns_and_its_end_is_told(tmp_path: Path) -> None:
    variables = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with DriverSide("echo", [sys.executable, "-c", ECHO], variables, tmp_path / "echo.log", tmp_path) as side:
        assert side.ready() == {}
        assert [side.step(1)["seconds"], side.step(2)["seconds"]] == [1.0, 2.0]
        with pytest.raises(PeerError, match="out of luck"):
            side.step(3)
    assert "noise of a library" in (tmp_path / "echo.log").read_text()


def test_ratio_is_of_pairs() -> None:
    result = summary("a", "b", [(1.0, 2.0), (4.0, 4.0), (9.0, 3.0)])
    ratio = Spread(**result["a/b"])
    assert (ratio.smallest, ratio.median, ratio.largest) == (0.5, 1.0, 3.0)
    assert (ratio.lower_quartile, ratio.upper_quartile) == (0.75, 2.0)
    assert Spread.of([2.0]).upper_quartile == 2.0


def test_prompts_have_the_asked_length(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    short = length([{"role": "user", "content": "What is 1+1? Answer with the number only."}], tokenizer)
    assert set(write_questions(tmp_path / "a", tokenizer, count=4, prompt_tokens=None)) == {short}
    with pytest.raises(SystemExit, match="cannot have exactly"):
        write_questions(tmp_path / "b", tokenizer, count=1, prompt_tokens=short - 1)
