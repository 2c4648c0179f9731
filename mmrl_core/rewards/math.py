r"""`math`: the answer in `\boxed{}`, compared as mathematics by math-verify.

math-verify limits its own time with SIGALRM, which Python delivers to the main thread only. A reward worker scores in
its main thread; inline it works only where the training loop runs in the main thread.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Sequence
from typing import Any

from math_verify import parse, verify
from math_verify.errors import TimeoutException

from mmrl_core.contracts import Reward, RewardResult, Sample
from mmrl_core.errors import RewardError
from mmrl_core.rewards.options import MathOptions

log = logging.getLogger("mmrl.rewards.math")

_BOX = r"\boxed{"


class MathReward(Reward):
    r"""1 when the text's last `\boxed{}` equals the reference, else 0. Sub-scores: `correct`, `boxed`.

    The reference is a number or LaTeX, with or without a box of its own. A reference that cannot be read and a
    comparison that runs out of time are failures; an answer that cannot be read is a wrong answer.
    """

    options: MathOptions

    def setup(self, device: str) -> None:
        """Check that math-verify can limit its time here. Raises RewardError."""
        _require_main_thread()

    def score(self, samples: Sequence[Sample]) -> list[RewardResult]:
        """One result a sample. Raises RewardError outside the main thread."""
        _require_main_thread()
        return [self._score_one(sample) for sample in samples]

    def _score_one(self, sample: Sample) -> RewardResult:
        origin = sample.prompt.origin or f"prompt {sample.prompt.index}"
        if sample.text is None:
            return RewardResult(failure="the sample has no text; math scores text policies only")
        if sample.answer is None:
            return RewardResult(failure=f"{origin} has no reference answer")
        seconds = self.options.timeout_s
        answer = last_boxed(sample.text)
        boxed = float(answer is not None)
        try:
            expected = _expressions(str(sample.answer), last_boxed(str(sample.answer)), seconds)
            if not expected:
                return RewardResult(failure=f"math-verify cannot read the reference {sample.answer!r} of {origin}")
            if answer is None and self.options.require_boxed:
                correct = False
            else:
                correct = _equal(expected, _expressions(sample.text, answer, seconds), seconds)
        except TimeoutException:
            return RewardResult(failure=f"math-verify timed out after {seconds} s")
        return RewardResult(value=float(correct), scores={"correct": float(correct), "boxed": boxed})


def last_boxed(text: str) -> str | None:
    r"""What the last complete `\boxed{...}` of the text holds, braces balanced, or None."""
    start = text.rfind(_BOX)
    while start >= 0:
        depth, position = 1, start + len(_BOX)
        while position < len(text):
            if text[position] == "\\":  # an escaped brace is content
                position += 2
                continue
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[start + len(_BOX) : position]
            position += 1
        start = text.rfind(_BOX, 0, start)
    return None


@functools.lru_cache(maxsize=1024)  # the samples of a group share their reference
def _expressions(text: str, boxed: str | None, seconds: int) -> tuple[Any, ...]:
    """What math-verify reads: a box's content as LaTeX, else the text. Empty when it reads nothing.

    Raises TimeoutException.
    """
    candidates = [f"${boxed}$", boxed] if boxed is not None else [f"${text}$", text] if len(text) < 200 else [text]
    for candidate in candidates:
        try:
            found = parse(candidate, parsing_timeout=seconds, raise_on_error=True)
        except Exception:
            log.debug("math-verify cannot read %r", candidate, exc_info=True)
            continue
        if found:
            return tuple(found)
    return ()


def _equal(expected: Sequence[Any], given: Sequence[Any], seconds: int) -> bool:
    """Whether any reading of the answer equals any reading of the reference. Raises TimeoutException when none does
    and a comparison ran out of time."""
    late: TimeoutException | None = None
    for gold in expected:
        for answer in given:
            try:
                if verify(gold, answer, timeout_seconds=seconds, raise_on_error=True):
                    return True
            except TimeoutException as error:
                late = error
            except Exception:
                log.debug("math-verify cannot compare", exc_info=True)
    if late is not None:
        raise late
    return False


def _require_main_thread() -> None:
    if threading.current_thread() is not threading.main_thread():
        raise RewardError(
            "reward 'math' is called outside the main thread, where math-verify cannot limit its time (SIGALRM). "
            "Cure: `run: worker`"
        )
