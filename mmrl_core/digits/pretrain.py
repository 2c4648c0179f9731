"""A class-conditional diffusion transformer, trained by flow matching on digits half of whose labels are shuffled.

It draws good digits and mostly not the one that was asked for: there is something to learn, and a reward can teach it.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from mmrl_core.digits.images import SIZE, DigitImages, load_images
from mmrl_core.policies.flow.dit import ClassConditionalDiT, DitConfig, write_folder

CONFIG = DitConfig(
    sample_size=SIZE, channels=1, patch_size=2, width=64, depth=3, heads=4, classes=[str(digit) for digit in range(10)]
)
SHIFT = 3.0
SHUFFLED = 0.5
"""Share of the images whose labels are permuted among themselves."""
UNLABELLED = 0.1
"""Share of each batch trained without a class, for classifier-free guidance."""
ITERATIONS, BATCH, LEARNING_RATE, WARM_UP = 700, 128, 5e-3, 50


def make_folder(folder: Path, *, seed: int = 0, iterations: int = ITERATIONS) -> None:
    """Train and write the model's folder. Progress goes to stderr. Raises DataError without scikit-learn."""
    images, _ = load_images()
    network = pretrain(images, seed=seed, iterations=iterations)
    write_folder(folder, network, shift=SHIFT)


def pretrain(images: DigitImages, *, seed: int, iterations: int = ITERATIONS) -> ClassConditionalDiT:
    """Flow matching (Lipman et al. 2023, arXiv:2210.02747): regress noise - x_0 at x_sigma, sigma logit-normal
    (Esser et al. 2024, arXiv:2403.03206). A pure function of the images, the seed and the number of threads."""
    draw = torch.Generator().manual_seed(seed)
    labels = shuffle_labels(images.labels, draw)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = ClassConditionalDiT(CONFIG)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)
    started, mean_loss = time.perf_counter(), 0.0
    for iteration in range(iterations):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * _rate(iteration, iterations)
        chosen = torch.randint(len(images), (BATCH,), generator=draw)
        loss = _loss(network, images.pixels[chosen], labels[chosen], draw)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        mean_loss += (float(loss.detach()) - mean_loss) / min(iteration + 1, 50)
        _report(iteration + 1, iterations, mean_loss, time.perf_counter() - started)
    return network.eval()


def shuffle_labels(labels: Tensor, draw: torch.Generator) -> Tensor:
    """[n]: the labels of SHUFFLED of the images permuted among themselves, so that each digit stays as frequent."""
    chosen = torch.randperm(len(labels), generator=draw)[: int(SHUFFLED * len(labels))]
    shuffled = labels.clone()
    shuffled[chosen] = labels[chosen[torch.randperm(len(chosen), generator=draw)]]
    return shuffled


def _loss(network: ClassConditionalDiT, pixels: Tensor, labels: Tensor, draw: torch.Generator) -> Tensor:
    noise = torch.randn(pixels.shape, generator=draw)
    sigma = torch.sigmoid(torch.randn(len(pixels), generator=draw))
    dropped = torch.rand(len(pixels), generator=draw) < UNLABELLED
    given = torch.where(dropped, len(network.config.classes), labels)
    level = sigma.view(-1, 1, 1, 1)
    velocity = network((1 - level) * pixels + level * noise, sigma, given)
    error: Tensor = velocity - (noise - pixels)
    return error.square().mean()


def _rate(iteration: int, iterations: int) -> float:
    """Linear warm-up, then a cosine down to a fiftieth."""
    cosine = 0.5 * (1 + math.cos(math.pi * iteration / iterations))
    return min(1.0, (iteration + 1) / WARM_UP) * (0.02 + 0.98 * cosine)


def _report(done: int, total: int, loss: float, seconds: float) -> None:
    """One line that is overwritten on a terminal; elsewhere five lines in all."""
    terminal = sys.stderr.isatty()
    if done != total and done % (10 if terminal else max(1, total // 5)):
        return
    line = f"mmrl: training on digits  {done}/{total}  loss {loss:.3f}  {seconds:.0f} s"
    end = "\n" if done == total or not terminal else ""
    print(f"\r{line}" if terminal else line, end=end, file=sys.stderr, flush=True)
