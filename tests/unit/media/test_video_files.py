"""mp4 files, read back with PyAV itself where our own reader could hide a mistake."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmrl_core.errors import MediaError
from mmrl_core.media.videos import even_sized, first_frame, read_video, require_pyav, spread_frames, write_video

av = pytest.importorskip("av", reason="pip install 'mmrl-core[video]'")


def gradients(frames: int, height: int, width: int) -> Any:
    """Smooth pictures, which compression hardly changes; the blue of frame i is 40 * i."""
    y, x = np.mgrid[0:height, 0:width]
    still = [x * 255 / width, y * 255 / height]
    return np.stack([np.stack([*still, np.full(x.shape, 40.0 * i)], -1) for i in range(frames)]).astype(np.uint8)


def difference(left: Any, right: Any) -> float:
    return float(np.abs(left.astype(int) - right.astype(int)).mean())


@pytest.mark.parametrize(("shape", "fps"), [((6, 64, 96), 24), ((1, 32, 48), 16), ((5, 80, 48), 24000 / 1001)])
def test_frames_and_rate_come_back(tmp_path: Path, shape: tuple[int, int, int], fps: float) -> None:
    video = gradients(*shape)
    write_video(tmp_path / "v.mp4", video, fps=fps)
    with av.open(str(tmp_path / "v.mp4")) as container:
        (stream,) = container.streams.video
        assert not container.streams.audio
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.codec_context.height, stream.codec_context.width) == shape[1:]
        assert stream.average_rate == Fraction(fps).limit_denominator(1001)
        assert stream.codec_context.colorspace == stream.codec_context.color_primaries == 1, "BT.709, said so"
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(frames) == shape[0]
    assert difference(np.stack(frames), video) < 3
    ours, rate = read_video(tmp_path / "v.mp4")
    assert np.array_equal(ours, np.stack(frames))
    assert rate == pytest.approx(fps, rel=1e-4)
    assert [p.name for p in tmp_path.iterdir()] == ["v.mp4"]


@pytest.mark.parametrize(("height", "width"), [(33, 48), (32, 47), (33, 47), (8, 8), (1, 1)])
def test_odd_sizes_get_their_last_row_or_column_twice(tmp_path: Path, height: int, width: int) -> None:
    video = gradients(3, height, width)
    even = even_sized(video)
    assert even.shape == (3, height + height % 2, width + width % 2, 3)
    assert np.array_equal(even[:, :height, :width], video)
    assert np.array_equal(even[:, -1, :width], video[:, -1])
    assert np.array_equal(even[:, :height, -1], video[:, :, -1])
    write_video(tmp_path / "v.mp4", video, fps=8)
    read, _ = read_video(tmp_path / "v.mp4")
    assert read.shape == even.shape
    if height > 8:
        assert difference(read, even) < 4


@pytest.mark.parametrize(
    ("value", "fps", "name", "words"),
    [
        (gradients(1, 4, 4)[0], 8, "v.mp4", r"uint8 \[4, 4, 3\].*\[frames, H, W, 3\]"),
        (gradients(2, 4, 4).astype(float), 8, "v.mp4", "float64"),
        (gradients(2, 4, 4)[:0], 8, "v.mp4", r"\[0, 4, 4, 3\]"),
        (gradients(2, 4, 4), 0, "v.mp4", "more than 0"),
        (gradients(2, 4, 4), float("nan"), "v.mp4", "more than 0"),
        (gradients(2, 4, 4), 8, "v.avi", r"stored as \.mp4"),
    ],
)
def test_what_cannot_be_stored(tmp_path: Path, value: Any, fps: float, name: str, words: str) -> None:
    with pytest.raises(MediaError, match=words):
        write_video(tmp_path / name, value, fps=fps)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_encoder_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "v.mp4"
    write_video(path, gradients(2, 32, 32), fps=8)
    before = path.read_bytes()

    with monkeypatch.context() as patch:
        patch.setattr("mmrl_core.media.videos.even_sized", lambda frames: np.zeros((2, 31, 31, 3), np.uint8))
        with pytest.raises(MediaError, match=r"v\.mp4: cannot be written as H\.264"):  # x264 refuses odd sizes
            write_video(path, gradients(2, 32, 32), fps=8)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["v.mp4"]


@pytest.mark.parametrize("content", [None, b"", b"not a video at all" * 20])
def test_unreadable_videos(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "bad.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MediaError, match=r"bad\.mp4: cannot be read as a video"):
        read_video(path)


def test_pyav_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    for use in (
        lambda: write_video(tmp_path / "v.mp4", gradients(1, 4, 4), fps=8),
        lambda: read_video(tmp_path / "v.mp4"),
        lambda: require_pyav("it"),
    ):
        with pytest.raises(MediaError, match=r"needs PyAV.*pip install 'mmrl-core\[video\]'"):
            use()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("frames", "count", "chosen"),
    [(81, 3, [0, 40, 80]), (81, 1, [0]), (2, 5, [0, 1]), (5, 4, [0, 1, 3, 4]), (1, 3, [0])],
)
def test_frames_of_a_strip(frames: int, count: int, chosen: list[int]) -> None:
    video = np.arange(frames, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    assert spread_frames(video, count)[:, 0, 0, 0].tolist() == chosen
    assert first_frame(video).tolist() == [[[0, 0, 0]]]
    assert first_frame(video[0]) is not None


def test_the_package_needs_neither_torch_nor_pyav_to_be_imported() -> None:
    code = "import mmrl_core.media.sheets, mmrl_core.media.videos, mmrl_core.rewards.image, mmrl_core.metrics.images, "
    code += "mmrl_core.metrics.reward_history, sys; assert not {'torch', 'av', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
