"""Two classifiers that know digits, share nothing, and come from the cache the second time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmrl_core.digits import classifier as classifiers
from mmrl_core.digits.classifier import KINDS, DigitClassifier, accuracy, load_classifier, spoilt, train
from mmrl_core.digits.images import DigitImages, load_images
from mmrl_core.errors import ModelError

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def images() -> tuple[DigitImages, DigitImages]:
    return load_images()


@pytest.fixture(scope="module")
def trained(images: tuple[DigitImages, DigitImages]) -> dict[str, DigitClassifier]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifiers, "ITERATIONS", 120)  # less than a third of what is used
        return {name: train(kind, images[0]) for name, kind in KINDS.items()}


@pytest.mark.parametrize("name", sorted(KINDS))
def test_it_knows_images_it_has_not_seen(
    trained: dict[str, DigitClassifier], images: tuple[DigitImages, DigitImages], name: str
) -> None:
    assert accuracy(trained[name], images[1]) > 0.9


def test_only_the_one_to_learn_from_doubts_what_is_no_digit(
    trained: dict[str, DigitClassifier], images: tuple[DigitImages, DigitImages]
) -> None:
    bad = spoilt(images[1], torch.Generator().manual_seed(0))
    sure = {name: float(one(bad).softmax(-1).amax(-1).mean()) for name, one in trained.items()}
    assert sure["reward"] < 0.4
    assert sure["judge"] > 0.6


def test_spoilt_images_are_blends_of_two_digits_or_shuffled_pieces(images: tuple[DigitImages, DigitImages]) -> None:
    tokens = torch.arange(64.0).view(1, 1, 8, 8)
    same = DigitImages(pixels=tokens.expand(6, 1, 8, 8), labels=torch.zeros(6, dtype=torch.int64))
    cut = spoilt(same, torch.Generator().manual_seed(0))
    whole = {tuple(tokens[0, 0, i : i + 2, j : j + 2].flatten().tolist()) for i in (0, 2, 4, 6) for j in (0, 2, 4, 6)}
    for image in cut[:, 0]:
        pieces = {tuple(image[i : i + 2, j : j + 2].flatten().tolist()) for i in (0, 2, 4, 6) for j in (0, 2, 4, 6)}
        assert pieces == whole
        assert not torch.equal(image, tokens[0, 0])
    two = DigitImages(pixels=torch.arange(64.0).view(64, 1, 1, 1).expand(64, 1, 8, 8), labels=torch.arange(64))
    halves = {float(value) for value in spoilt(two, torch.Generator().manual_seed(0))[:, 0, 0, 0] * 2}
    assert any(value % 2 for value in halves), "an even and an odd grey, mixed"


def test_the_two_share_no_image_and_no_shape() -> None:
    reward, judge = KINDS["reward"], KINDS["judge"]
    seen = [set(range(1400)[kind.images]) for kind in (reward, judge)]
    assert not seen[0] & seen[1]
    assert reward.width != judge.width
    assert reward.noise != judge.noise
    assert reward.seed != judge.seed


def test_training_is_deterministic_and_leaves_torch_as_it_was(
    images: tuple[DigitImages, DigitImages], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifiers, "ITERATIONS", 10)
    torch.manual_seed(5)
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    first = train(KINDS["judge"], images[0]).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    torch.rand(3)
    second = train(KINDS["judge"], images[0]).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_it_is_trained_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MMRL_CACHE", str(tmp_path))
    monkeypatch.setattr(classifiers, "ITERATIONS", 3)
    first = load_classifier("reward").state_dict()
    (file,) = (tmp_path / "models").iterdir()
    monkeypatch.setattr(classifiers, "train", lambda *_: pytest.fail("trained again"))
    second = load_classifier("reward").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)

    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ModelError, match="Delete the file"):
        load_classifier("reward")


def test_cached_weights_of_another_kind_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MMRL_CACHE", str(tmp_path))
    monkeypatch.setattr(classifiers, "ITERATIONS", 1)
    load_classifier("reward")
    (file,) = (tmp_path / "models").iterdir()
    file.rename(file.with_name(file.name.replace("reward", "judge")))
    with pytest.raises(ModelError, match="not the digits classifier"):
        load_classifier("judge")


def test_an_interrupted_write_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MMRL_CACHE", str(tmp_path))
    monkeypatch.setattr(classifiers, "ITERATIONS", 1)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        load_classifier("reward")
    assert list((tmp_path / "models").iterdir()) == []
