"""Contact sheets show every picture, readable, in order, and the same each time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import ImageFont

from mmrl_core.contracts import Prompt, Sample
from mmrl_core.errors import MediaError
from mmrl_core.media.samples import sample_pixels, visible_samples
from mmrl_core.media.sheets import CAPTION_LINES, Cell, contact_sheet, sample_sheet, side_by_side, wrapped

RED, GREEN, BLUE = (230, 0, 0), (0, 230, 0), (0, 0, 230)


def plain(colour: tuple[int, int, int], *shape: int) -> Any:
    return np.full((*shape, 3), colour, np.uint8)


def box(sheet: Any, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the only solid rectangle of this colour."""
    ys, xs = np.nonzero((sheet == colour).all(-1))
    top, left, height, width = ys.min(), xs.min(), np.ptp(ys) + 1, np.ptp(xs) + 1
    assert len(ys) == height * width, "not one solid rectangle"
    return int(top), int(left), int(height), int(width)


def ink(sheet: Any) -> int:
    """Pixels that are neither background nor one of the colours."""
    named = [(255, 255, 255), RED, GREEN, BLUE]
    return int((~np.any([(sheet == colour).all(-1) for colour in named], axis=0)).sum())


def test_sizes_differ_and_every_picture_is_whole() -> None:
    cells = [Cell(pixels=plain(RED, 8, 8)), Cell(pixels=plain(GREEN, 300, 600)), Cell(pixels=plain(BLUE, 200, 150))]
    sheet = contact_sheet(cells, largest=256)
    assert sheet.dtype == np.uint8
    red, green, blue = (box(sheet, colour) for colour in (RED, GREEN, BLUE))
    assert red[2:] == (128, 128), "8 x 8 is enlarged to be seen"
    assert green[2:] == (128, 256), "600 wide is scaled down, in proportion"
    assert blue[2:] == (200, 150), "what fits stays as it is"
    assert red[0] == green[0] < blue[0], "two columns"
    assert red[1] == blue[1] < green[1]
    assert red[1] + 256 < green[1], "columns are as wide as the widest picture"


def test_small_images_keep_their_pixels() -> None:
    checker = np.indices((8, 8)).sum(0)[..., None].repeat(3, -1).astype(np.uint8) % 2 * 200
    sheet = contact_sheet([Cell(pixels=checker)])
    top, left = 8, 8
    assert np.array_equal(sheet[top : top + 128, left : left + 128], checker.repeat(16, 0).repeat(16, 1))


@pytest.mark.parametrize(("side", "shown"), [(64, 128), (65, 65), (127, 127), (300, 200), (3, 126)])
def test_enlarging_is_by_whole_factors(side: int, shown: int) -> None:
    assert box(contact_sheet([Cell(pixels=plain(RED, side, side))], largest=200), RED)[2:] == (shown, shown)


def test_an_extreme_shape_is_still_there() -> None:
    assert box(contact_sheet([Cell(pixels=plain(RED, 2, 4000))]), RED)[2:] == (1, 256)


def test_a_video_is_a_strip_or_its_first_frame() -> None:
    video = np.stack([plain(colour, 100, 100) for colour in (RED, GREEN, BLUE, BLUE, BLUE)])
    video[1], video[2] = plain(BLUE, 100, 100), plain(GREEN, 100, 100)
    sheet = contact_sheet([Cell(pixels=video)], frames=3)
    lefts = [box(sheet, colour)[1] for colour in (RED, GREEN, BLUE)]
    assert lefts == sorted(lefts), "first, middle, last"
    assert box(sheet, RED)[2:] == (100, 100)
    one = contact_sheet([Cell(pixels=video)], frames=1)
    assert box(one, RED)[2:] == (100, 100)
    assert not (one == BLUE).all(-1).any()


def test_captions_stand_below_their_picture() -> None:
    cells = [Cell(pixels=plain(RED, 100, 100), caption="a fox", note="0.5"), Cell(pixels=plain(GREEN, 100, 100))]
    sheet = contact_sheet(cells)
    bare = contact_sheet([Cell(pixels=plain(RED, 100, 100)), Cell(pixels=plain(GREEN, 100, 100))])
    assert ink(bare) == 0
    top, left, height, width = box(sheet, RED)
    assert ink(sheet[top + height :, left : left + width]) == ink(sheet) > 50


def test_layout_is_the_same_each_time() -> None:
    cells = [Cell(pixels=plain(RED, 9, 5 + i), caption=f"prompt {i} " * 9, note=str(i)) for i in range(7)]
    assert np.array_equal(contact_sheet(cells, title="t"), contact_sheet(cells, title="t"))


def test_the_font_comes_with_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a font of the system was looked for")

    monkeypatch.setattr(ImageFont, "truetype", refuse)
    assert ink(contact_sheet([Cell(pixels=plain(RED, 9, 9), caption="text", note="1")], title="title")) > 50


def test_a_title_is_never_cut_off() -> None:
    narrow = contact_sheet([Cell(pixels=plain(RED, 8, 8))], title="before training: mean score 0.1234 and more")
    wide = contact_sheet(
        [Cell(pixels=plain(RED, 8, 8))] * 4, columns=4, title="before training: mean score 0.1234 and more"
    )
    assert ink(narrow) == ink(wide)


@pytest.mark.parametrize("text", ["", "word", "two words", "many words " * 50, "x" * 400, "a\nb\tc\0d", "狐" * 99])
def test_wrapping(text: str) -> None:
    font = ImageFont.load_default(12)
    lines = wrapped(text, 130, CAPTION_LINES)
    assert len(lines) <= CAPTION_LINES
    assert all(0 < font.getlength(line) <= 130 for line in lines)
    assert not any(c in line for line in lines for c in "\n\t\0")
    shown = "".join(lines).replace(" ", "")
    whole = text.replace("\0", " ")
    if shown.endswith("..."):
        assert "".join(whole.split()).startswith(shown[:-3])
        assert len(lines) == CAPTION_LINES
    else:
        assert shown == "".join(whole.split())


def test_nothing_to_show() -> None:
    with pytest.raises(MediaError, match="nothing"):
        contact_sheet([])
    with pytest.raises(MediaError, match="no image"):
        side_by_side([])
    with pytest.raises(MediaError, match="float32"):
        contact_sheet([Cell(pixels=plain(RED, 4, 4).astype(np.float32))])


def test_side_by_side() -> None:
    row = side_by_side([plain(RED, 100, 50), plain(GREEN, 300, 4000), plain(BLUE, 20, 60)], widest=400)
    red, green, blue = (box(row, colour) for colour in (RED, GREEN, BLUE))
    assert [b[2:] for b in (red, green, blue)] == [(100, 50), (30, 400), (20, 60)]
    assert red[0] == green[0] == blue[0] == 0
    assert red[1] < green[1] < blue[1]
    assert row.shape[0] == 100


# -------------------------------------------------------------------------------------------------------------- samples


def sample(i: int, group: int, **picture: Any) -> Sample:
    return Sample(sample_id=i, group_id=group, prompt=Prompt(index=group, text=f"prompt {group}"), **picture)


def test_visible_samples_are_sorted_and_limited() -> None:
    image = plain(RED, 4, 4)
    given = [sample(3, 1, image=image), sample(1, 0, text="words"), sample(2, 1, video=image[None]), sample(0, 0)]
    assert [s.sample_id for s in visible_samples(given)] == [2, 3]
    assert [s.sample_id for s in visible_samples(given, 1)] == [2]
    assert visible_samples(given, 0) == []


def test_a_row_holds_the_samples_of_one_prompt() -> None:
    colours = [RED, GREEN, BLUE] * 2
    samples = [sample(i, i // 3, image=plain(c, 200, 200)) for i, c in enumerate(colours)]
    sheet = sample_sheet(samples, largest=200)
    assert len(np.unique(np.nonzero((sheet == RED).all(-1))[1])) == 200, "one column"
    uneven = sample_sheet(samples[:4], largest=200)
    assert len(np.unique(np.nonzero((uneven == RED).all(-1))[1])) == 400, "near a square when groups are uneven"
    mixed = sample_sheet([samples[i] for i in (0, 3, 4, 1, 2, 5)], largest=200)
    assert mixed.shape == contact_sheet([Cell(pixels=plain(RED, 200, 200), caption="prompt 0")] * 6, largest=200).shape


def test_rewards_are_shown_where_they_are_known() -> None:
    samples = [sample(i, i, image=plain(RED, 100, 100)) for i in range(2)]
    without = ink(sample_sheet(samples))
    assert ink(sample_sheet([samples[0], replace(samples[1], score=0.25)])) > without


def test_a_sample_without_a_picture_is_named() -> None:
    with pytest.raises(MediaError, match="sample 5 has neither"):
        sample_sheet([sample(5, 0, text="words")])
    with pytest.raises(MediaError, match=r"the image of sample 5 is a .*float64"):
        sample_pixels(sample(5, 0, image=np.zeros((2, 2, 3))))
    with pytest.raises(MediaError, match="the video of sample 5"):
        sample_pixels(sample(5, 0, video=plain(RED, 2, 2)))
