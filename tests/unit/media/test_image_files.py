"""Images are stored whole or not at all, and what is no image is said to be none."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmrl_core.errors import MediaError
from mmrl_core.media.files import replacing
from mmrl_core.media.images import checked_image, checked_video, encode_jpeg, read_image, save_image

NOISE = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)


def test_png_is_lossless(tmp_path: Path) -> None:
    path = tmp_path / "not" / "yet" / "there.png"
    save_image(path, NOISE)
    with Image.open(path) as stored:
        assert (stored.format, stored.mode, stored.size) == ("PNG", "RGB", (53, 37))
    assert np.array_equal(read_image(path), NOISE)
    assert [p.name for p in path.parent.iterdir()] == ["there.png"]


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG"])
def test_jpeg_has_the_quality_asked_for(tmp_path: Path, suffix: str) -> None:
    paths = {quality: tmp_path / f"{quality}{suffix}" for quality in (50, 95)}
    errors = {}
    for quality, path in paths.items():
        save_image(path, NOISE, quality=quality)
        with Image.open(path) as stored:
            assert stored.format == "JPEG"
        errors[quality] = np.abs(read_image(path).astype(int) - NOISE).mean()
    assert errors[95] < errors[50]
    assert paths[95].read_bytes() == encode_jpeg(NOISE)


def test_jpeg_in_memory_is_the_file(tmp_path: Path) -> None:
    Image.fromarray(NOISE).save(tmp_path / "direct.jpg", quality=70)
    assert encode_jpeg(NOISE, 70) == (tmp_path / "direct.jpg").read_bytes()
    with Image.open(io.BytesIO(encode_jpeg(NOISE, 70))) as stored:
        assert stored.size == (53, 37)


def test_every_kind_of_file_is_read_as_rgb(tmp_path: Path) -> None:
    grey = Image.new("LA", (3, 2), (77, 128))
    grey.save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png").tolist() == [[[77] * 3] * 3] * 2


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "NoneType"),
        (NOISE.astype(np.float32), r"float32 \[37, 53, 3\]"),
        (NOISE[..., 0], r"uint8 \[37, 53\]"),
        (NOISE.transpose(2, 0, 1), r"\[3, 37, 53\]"),
        (NOISE[:0], r"\[0, 53, 3\]"),
        ([[1, 2, 3]], "list"),
    ],
)
def test_what_is_no_image(tmp_path: Path, value: Any, words: str) -> None:
    with pytest.raises(MediaError, match=rf"the thing is .*{words}.*uint8 array \[H, W, 3\]"):
        checked_image(value, "the thing")
    with pytest.raises(MediaError, match=r"a\.png"):
        save_image(tmp_path / "a.png", value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(MediaError, match="frames"):
        checked_video(value)


def test_another_suffix(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"a\.gif.*\.png, \.jpg"):
        save_image(tmp_path / "a.gif", NOISE)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 50, None])
def test_unreadable_images(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "bad.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MediaError, match=r"bad\.png: cannot be read as an image"):
        read_image(path)


def test_a_truncated_image_is_unreadable(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", NOISE)
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MediaError, match=r"a\.png"):
        read_image(tmp_path / "a.png")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    save_image(path, NOISE)
    before = path.read_bytes()

    def save(self: Image.Image, file: Any, *_: Any, **__: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(MediaError, match=r"a\.png: cannot be written: .*No space left"):
        save_image(path, NOISE[:5])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_an_interrupted_block_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def interrupted() -> None:
        with replacing(path) as beside:
            beside.write_text("new")
            assert path.read_text() == "old", "not before the block has ended"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    with replacing(path) as beside:
        beside.write_text("new")
    assert path.read_text() == "new"


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MediaError, match=r"a\.png: cannot be written"):
        save_image(tmp_path / "file" / "a.png", NOISE)
