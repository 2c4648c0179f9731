"""The digits and their split."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from mmrl_core.digits.images import TRAIN_IMAGES, load_images
from mmrl_core.digits.probes import scikit_learn
from mmrl_core.errors import DataError


def test_split_is_fixed_and_holds_every_image_once() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    train, test = load_images()
    assert (len(train), len(test)) == (TRAIN_IMAGES, 1797 - TRAIN_IMAGES)
    data = datasets.load_digits()
    together = torch.cat([train.pixels, test.pixels]).flatten(1).numpy()
    assert together.min() == -1
    assert together.max() == 1
    both = np.column_stack([together, torch.cat([train.labels, test.labels])])
    given = np.column_stack([data.data / 8 - 1, data.target])
    assert sorted(map(tuple, both)) == sorted(map(tuple, given.astype(np.float32)))
    # the classifiers' cache and the model's survive only if this never changes
    assert test.labels[:12].tolist() == [4, 6, 1, 4, 1, 2, 5, 4, 5, 7, 4, 4]


def test_without_scikit_learn_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install 'mmrl-core\[digits\]'"):
        load_images()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    probe = scikit_learn()
    assert not probe.available
    assert "mmrl-core[digits]" in probe.cure
