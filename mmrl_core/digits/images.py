"""The images: 1797 digits of 8 x 8 pixels that come with scikit-learn (UCI, "Optical recognition of digits")."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmrl_core.errors import DataError

SIZE = 8
"""Height and width."""
TRAIN_IMAGES = 1400
"""The others are for testing."""


@dataclass(frozen=True, kw_only=True)
class DigitImages:
    """Some images with their labels."""

    pixels: Tensor
    """[n, 1, 8, 8] fp32 in [-1, 1]; 1 is ink."""
    labels: Tensor
    """[n] int64."""

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, index: slice | Tensor) -> DigitImages:
        """Some of them."""
        return DigitImages(pixels=self.pixels[index], labels=self.labels[index])


def load_images() -> tuple[DigitImages, DigitImages]:
    """(training, test) images, always split alike. Raises DataError without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            f"the digits come with scikit-learn ({error}). Cure: pip install 'mmrl-core[digits]'"
        ) from error
    data = load_digits()
    pixels = torch.from_numpy(data.images / 8.0 - 1.0).float().unsqueeze(1)
    labels = torch.from_numpy(data.target).to(torch.int64)
    # RandomState's streams are frozen by NumPy's compatibility policy (NEP 19)
    order = torch.from_numpy(np.random.RandomState(np.random.MT19937(0)).permutation(len(labels)))
    everything = DigitImages(pixels=pixels, labels=labels)
    return everything.part(order[:TRAIN_IMAGES]), everything.part(order[TRAIN_IMAGES:])
