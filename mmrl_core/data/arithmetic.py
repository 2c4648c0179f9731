"""Procedural arithmetic: every problem of a range, split into training and test problems that never overlap."""

from __future__ import annotations

import hashlib
import json

import numpy as np
from numpy.typing import NDArray

from mmrl_core.contracts import Prompt, PromptSource
from mmrl_core.data.options import ArithmeticOptions
from mmrl_core.data.order import EpochOrder
from mmrl_core.data.placeholders import fill
from mmrl_core.errors import DataError

OPERATIONS = ("+", "-", "*")
"""A problem's operation by number. The split depends on these numbers: append only."""

_COMMUTATIVE = np.array([True, False, True])
_CHUNK = 1 << 20


class ArithmeticSource(PromptSource):
    """Sums, differences and products. The answer is the result as a string of digits."""

    options: ArithmeticOptions

    def __init__(self, options: ArithmeticOptions, seed: int) -> None:
        super().__init__(options, seed)
        self._problems: NDArray[np.int64] = np.empty(0, np.int64)
        self._order: EpochOrder | None = None

    def prepare(self) -> None:
        """Enumerate the problems of the split. Raises DataError when there is none."""
        options = self.options
        total = len(options.operations) * self._width**2
        chunks = [self._selected(start, min(start + _CHUNK, total)) for start in range(0, total, _CHUNK)]
        self._problems = np.concatenate(chunks)
        if not len(self._problems):
            raise DataError(
                f"arithmetic: split {options.split!r} is empty: none of the {total} problems "
                f"({' '.join(options.operations)} on {options.smallest}..{options.largest}) falls into it with "
                f"test_fraction {options.test_fraction}. Widen the range or change test_fraction"
            )
        self._order = EpochOrder(len(self._problems), self.seed)

    def __len__(self) -> int:
        return len(self._problems)

    def prompt(self, index: int) -> Prompt:
        """The `index`-th problem of the run."""
        assert self._order is not None, "prepare() comes first"
        problem = np.array([self._problems[self._order.row(index)]])
        operation, left, right = (int(part[0]) for part in self._parts(problem))
        sign = OPERATIONS[operation]
        expression = f"{left} {sign} {right if right >= 0 else f'({right})'}"
        result = {"+": left + right, "-": left - right, "*": left * right}[sign]
        messages = [{"role": "user", "content": fill(self.options.question_template, lambda _: expression)}]
        if self.options.system is not None:
            messages.insert(0, {"role": "system", "content": self.options.system})
        return Prompt(
            index=index,
            messages=tuple(messages),
            answer=str(result),
            columns={"expression": expression},
            origin=f"arithmetic: {expression}",
        )

    def digest(self) -> str:
        """Of the options and the seed, which determine everything."""
        assert self._order is not None, "prepare() comes first"
        described = ["arithmetic", self.options.model_dump(mode="json"), self.seed, len(self)]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    @property
    def _width(self) -> int:
        return self.options.largest - self.options.smallest + 1

    def _parts(self, problems: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Operation number, left and right operand, each [n], of problem numbers [n]."""
        numbers = np.array(sorted(OPERATIONS.index(o) for o in self.options.operations), dtype=np.int64)
        which, pair = np.divmod(problems, self._width**2)
        left, right = np.divmod(pair, self._width)
        return numbers[which], left + self.options.smallest, right + self.options.smallest

    def _selected(self, start: int, stop: int) -> NDArray[np.int64]:
        """The problem numbers of start..stop that belong to the split."""
        problems = np.arange(start, stop, dtype=np.int64)
        if self.options.split == "all":
            return problems
        is_test = split_position(*self._parts(problems)) < self.options.test_fraction
        return problems[is_test if self.options.split == "test" else ~is_test]


def split_position(
    operation: NDArray[np.int64], left: NDArray[np.int64], right: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Where each problem falls in [0, 1), [n]; below `test_fraction` it is a test problem.

    A hash of the problem alone (the finaliser of SplitMix64: Steele, Lea and Flood, "Fast splittable pseudorandom
    number generators", 2014). The operands of + and * are put in order first: knowing 3 + 4 answers 4 + 3.
    """
    swap = _COMMUTATIVE[operation] & (left > right)
    first, second = np.where(swap, right, left), np.where(swap, left, right)
    position = _mix(_mix(_mix(operation.astype(np.uint64)) ^ first.astype(np.uint64)) ^ second.astype(np.uint64))
    fraction: NDArray[np.float64] = (position >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return fraction


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One SplitMix64 step, modulo 2**64."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
