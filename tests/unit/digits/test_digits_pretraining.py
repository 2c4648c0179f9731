"""The diffusion model that the image quickstart starts from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmrl_core.digits.images import load_images
from mmrl_core.digits.pretrain import make_folder, pretrain, shuffle_labels
from mmrl_core.policies.flow.dit import DitFamily
from mmrl_core.policies.flow.families import choose_family
from mmrl_core.policies.flow.options import FlowOptions, FlowSampling

pytest.importorskip("sklearn")


def test_half_of_the_labels_are_shuffled() -> None:
    labels = load_images()[0].labels
    shuffled = shuffle_labels(labels, torch.Generator().manual_seed(0))
    assert torch.equal(labels.bincount(), shuffled.bincount()), "a permutation keeps each digit as frequent"
    changed = float((labels != shuffled).float().mean())
    assert changed == pytest.approx(0.5 * 0.9, abs=0.03), "a tenth of the shuffled ones meet their own digit"


def test_the_folder_is_one_that_the_policy_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path / "model", iterations=3)
    family = choose_family(tmp_path / "model", FlowOptions(), torch.float32)
    assert isinstance(family, DitFamily)
    family.prepare()
    sampling = FlowSampling(steps=2, height=8, width=8)
    assert family.latent_shape(sampling) == (1, 8, 8)
    network = family.load_network(torch.float32)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(240_000, rel=0.05)
    assert int(family.encode(family.load_encoders(), ["the digit 7"])[0]["label"]) == 7
    assert "3/3" in capsys.readouterr().err


def test_training_is_deterministic_and_learns(capsys: pytest.CaptureFixture[str]) -> None:
    images = load_images()[0]
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = pretrain(images, seed=3, iterations=10).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(2)
    second = pretrain(images, seed=3, iterations=10).state_dict()
    other = pretrain(images, seed=4, iterations=2).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["position"], other["position"])
    losses = [float(line.split("loss ")[1].split()[0]) for line in capsys.readouterr().err.splitlines()[:5]]
    assert losses[-1] < losses[0]
