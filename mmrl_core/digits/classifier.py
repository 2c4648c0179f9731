"""Two classifiers of digits that share nothing: one to learn from, one to judge by.

They see different halves of the training images, start from different weights, and differ in width, in noise and in
what they are taught: the one to learn from is also shown what is no digit, so that it cannot be pleased by a blot; the
judge is not. Each is trained once, in seconds, and kept in the model cache.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from mmrl_core.digits.images import SIZE, TRAIN_IMAGES, DigitImages, load_images
from mmrl_core.errors import ModelError
from mmrl_core.packaged_models import model_cache

log = logging.getLogger("mmrl.digits")

VERSION = 2
"""Grows when anything below changes the weights; the cached file's name has it."""
ITERATIONS, BATCH, LEARNING_RATE = 400, 128, 2e-3


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What makes a classifier."""

    images: slice
    """Which of the training images it sees."""
    width: int
    noise: float
    """Standard deviation of the noise added to training images."""
    spoilt: float
    """Weight of the images that are no digit, for which every class should be equally likely."""
    seed: int


KINDS = {
    "reward": Kind(images=slice(0, TRAIN_IMAGES // 2), width=16, noise=0.2, spoilt=0.5, seed=11),
    "judge": Kind(images=slice(TRAIN_IMAGES // 2, TRAIN_IMAGES), width=24, noise=0.3, spoilt=0.0, seed=22),
}


class DigitClassifier(nn.Module):
    """Two convolutions and two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.near = nn.Conv2d(1, width, 3, padding=1)
        self.far = nn.Conv2d(width, 2 * width, 3, padding=1, stride=2)
        self.hidden = nn.Linear(2 * width * (SIZE // 2) ** 2, 4 * width)
        self.out = nn.Linear(4 * width, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits [n, 10] of pixels [n, 1, 8, 8] in [-1, 1]."""
        features = functional.relu(self.far(functional.relu(self.near(pixels))))
        logits: Tensor = self.out(functional.relu(self.hidden(features.flatten(1))))
        return logits


def load_classifier(name: str) -> DigitClassifier:
    """A classifier of KINDS, on the CPU, in evaluation mode: from the cache, or trained and kept there.

    Raises DataError without scikit-learn, ModelError when the cached file is not what was written.
    """
    kind = KINDS[name]
    file = model_cache() / f"digits-{name}-v{VERSION}.safetensors"
    if not file.is_file():
        train_images, test_images = load_images()
        trained = train(kind, train_images)
        log.info(
            "trained the digits classifier %r (once, into %s): %.1f %% of %d test images right",
            name,
            file,
            100 * accuracy(trained, test_images),
            len(test_images),
        )
        _store(trained, file)
    return _load(kind, name, file)


def train(kind: Kind, images: DigitImages) -> DigitClassifier:
    """Train on `kind.images` of the training images: deterministic, a second or two, on one thread.

    The loss on spoilt images is outlier exposure (Hendrycks et al. 2019, arXiv:1812.04606).
    """
    seen = images.part(kind.images)
    draw = torch.Generator().manual_seed(kind.seed)
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(kind.seed)
        classifier = DigitClassifier(kind.width)
        optimizer = torch.optim.Adam(classifier.parameters(), lr=LEARNING_RATE)
        for iteration in range(ITERATIONS):
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - iteration / ITERATIONS)
            batch = seen.part(torch.randint(len(seen), (BATCH,), generator=draw))
            loss = functional.cross_entropy(classifier(noisy(batch.pixels, kind.noise, draw)), batch.labels)
            if kind.spoilt:
                bad = noisy(spoilt(batch, draw), kind.noise, draw)
                loss = loss - kind.spoilt * functional.log_softmax(classifier(bad), -1).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return classifier.eval().requires_grad_(False)


def noisy(pixels: Tensor, noise: float, draw: torch.Generator) -> Tensor:
    """With Gaussian noise of that standard deviation, of the same shape."""
    return pixels + noise * torch.randn(pixels.shape, generator=draw)


def spoilt(images: DigitImages, draw: torch.Generator) -> Tensor:
    """[n, 1, 8, 8]: no digits any more. One half is blended with an image of another digit, the other half cut into
    sixteen pieces that are put together at random."""
    count = len(images)
    other = images.part(torch.randperm(count, generator=draw))
    pieces = functional.unfold(images.pixels, SIZE // 4, stride=SIZE // 4)
    order = torch.rand(count, pieces.shape[-1], generator=draw).argsort(1)
    shuffled = pieces.gather(2, order[:, None].expand_as(pieces))
    cut = functional.fold(shuffled, (SIZE, SIZE), SIZE // 4, stride=SIZE // 4)
    blend = (torch.rand(count, generator=draw) < 0.5) & (images.labels != other.labels)
    return torch.where(blend.view(-1, 1, 1, 1), (images.pixels + other.pixels) / 2, cut)


def accuracy(classifier: DigitClassifier, images: DigitImages) -> float:
    """Share of the images that it gets right."""
    with one_thread(), torch.no_grad():
        return float((classifier(images.pixels).argmax(-1) == images.labels).float().mean())


@contextmanager
def one_thread() -> Iterator[None]:
    """Within the block torch computes on one thread: these networks are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _store(classifier: DigitClassifier, file: Path) -> None:
    """Write the file whole or not at all; of several processes that trained it, the last one's stays."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    os.close(handle)
    try:
        save_file(classifier.state_dict(), partial)
        os.replace(partial, file)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def _load(kind: Kind, name: str, file: Path) -> DigitClassifier:
    classifier = DigitClassifier(kind.width)
    try:
        classifier.load_state_dict(load_file(file))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ModelError(f"{file}: not the digits classifier {name!r}: {error}. Delete the file") from error
    return classifier.eval().requires_grad_(False)
