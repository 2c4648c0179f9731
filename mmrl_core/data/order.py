"""The order in which a run visits the rows of its data."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray


class EpochOrder:
    """Epochs follow each other; each visits every row once, in an order that is a pure function of (seed, epoch)."""

    def __init__(self, length: int, seed: int, *, shuffle: bool = True) -> None:
        assert length > 0
        self.length = length
        self._seed = seed
        self._shuffle = shuffle
        # Two, so that a step across the border of two epochs does not recompute either.
        self._epoch = functools.lru_cache(maxsize=2)(self._permutation)

    def row(self, index: int) -> int:
        """Row visited at position `index >= 0` of the run, 0 <= row < length."""
        assert index >= 0
        epoch, position = divmod(index, self.length)
        return int(self._epoch(epoch)[position]) if self._shuffle else position

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        # RandomState's streams are frozen by NumPy's compatibility policy (NEP 19), Generator's are not; a run may be
        # resumed under another version.
        bits = np.random.MT19937(np.random.SeedSequence([self._seed, epoch]))
        return np.random.RandomState(bits).permutation(self.length)
