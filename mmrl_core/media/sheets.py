"""Contact sheets: pictures of many images with captions, laid out the same on every machine. Imports no torch."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmrl_core.errors import MediaError
from mmrl_core.media.images import Pixels, checked_image, checked_video
from mmrl_core.media.samples import sample_pixels
from mmrl_core.media.videos import spread_frames

if TYPE_CHECKING:
    from mmrl_core.contracts import Sample

READABLE = 128
"""Smaller images are enlarged to this many pixels or a little less, by a whole factor."""

CAPTION_LINES = 3
"""Longer captions end with an ellipsis."""

_NARROWEST = 96
"""Columns are at least so wide, so that captions keep whole words."""

_GAP = 8
_FRAME_GAP = 2
_LINE = 15
_TITLE = 24
_BACKGROUND, _INK, _NOTE_INK = (255, 255, 255), (40, 40, 40), (20, 70, 160)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One place of a contact sheet."""

    pixels: Pixels
    """An image [H, W, 3] or a video [F, H, W, 3]."""
    caption: str = ""
    """Below it, wrapped, at most `CAPTION_LINES` lines; the prompt, as a rule."""
    note: str = ""
    """One line below the caption; the reward, as a rule."""


def contact_sheet(
    cells: Sequence[Cell], *, columns: int | None = None, largest: int = 256, frames: int = 3, title: str = ""
) -> Pixels:
    """All cells in rows of `columns` (by default as many as make the sheet about square), uint8 [H, W, 3].

    Images may differ in size: a longer side of more than `largest` pixels is scaled down to it (Lanczos), and an image
    smaller than `READABLE` is enlarged by a whole factor with nearest-neighbour, so that its pixels are seen. A video
    is a strip of at most `frames` frames, evenly spread from the first to the last. The font comes with Pillow, and
    what it has no glyph for is a box. Raises MediaError when there is nothing to show or something is no picture.
    """
    if not cells:
        raise MediaError("a contact sheet of nothing; give at least one image or video")
    tiles = [_tile(cell.pixels, largest, frames) for cell in cells]
    width = max(_NARROWEST, *(tile.shape[1] for tile in tiles))
    columns = min(columns or _squarest(len(cells), width), len(cells))
    captions = [_caption(cell, width) for cell in cells]
    rows = [range(start, min(start + columns, len(cells))) for start in range(0, len(cells), columns)]
    tall = [max(tiles[i].shape[0] for i in row) for row in rows]
    below = [_LINE * max(len(captions[i]) for i in row) for row in rows]
    top = _GAP + (_TITLE if title else 0)
    height = top + sum(tall) + sum(below) + _GAP * len(rows)
    wide = max(_GAP + columns * (width + _GAP), 2 * _GAP + math.ceil(_font(16).getlength(_plain(title))))
    sheet = Image.new("RGB", (wide, height), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((_GAP, _GAP // 2), _plain(title), font=_font(16), fill=_INK)
    for row, picture, text in zip(rows, tall, below, strict=True):
        for place, i in enumerate(row):
            left = _GAP + place * (width + _GAP)
            sheet.paste(Image.fromarray(tiles[i]), (left, top))
            for number, (line, ink) in enumerate(captions[i]):
                draw.text((left, top + picture + number * _LINE), line, font=_font(12), fill=ink)
        top += picture + text + _GAP
    return np.asarray(sheet)


def side_by_side(panels: Sequence[Pixels], *, widest: int = 2000) -> Pixels:
    """Images [H, W, 3] in a row, their upper edges aligned; those wider than `widest` are scaled down to it.

    Raises MediaError when there is nothing to show or something is no image.
    """
    if not panels:
        raise MediaError("no image to put side by side; give at least one")
    shown = [_scaled(checked_image(pixels), widest / pixels.shape[1]) for pixels in panels]
    width = sum(image.shape[1] for image in shown) + 2 * _GAP * (len(shown) - 1)
    whole = Image.new("RGB", (width, max(image.shape[0] for image in shown)), _BACKGROUND)
    left = 0
    for image in shown:
        whole.paste(Image.fromarray(image), (left, 0))
        left += image.shape[1] + 2 * _GAP
    return np.asarray(whole)


# -------------------------------------------------------------------------------------------------------------- samples


def sample_sheet(samples: Sequence[Sample], *, largest: int = 256, frames: int = 3, title: str = "") -> Pixels:
    """The contact sheet of samples that have an image or a video, with their prompts, and with the scores of those
    that have one. When every prompt has equally many samples, a row holds those of one prompt.

    Raises MediaError when a sample has neither, or something that is no picture.
    """
    cells = [
        Cell(pixels=sample_pixels(sample), caption=sample.prompt.question(), note=sample.shown_score())
        for sample in samples
    ]
    return contact_sheet(cells, columns=_group_size(samples), largest=largest, frames=frames, title=title)


def _group_size(samples: Sequence[Sample]) -> int | None:
    """Samples a prompt, when every prompt has the same number of adjacent ones and a row can hold them."""
    runs = [len(list(run)) for _, run in itertools.groupby(sample.group_id for sample in samples)]
    size = runs[0] if runs else 0
    return size if len(runs) > 1 and 1 < size <= 16 and set(runs) == {size} else None


# --------------------------------------------------------------------------------------------------------------- layout


def _tile(pixels: Pixels, largest: int, frames: int) -> Pixels:
    """What is shown of an image or a video, [h, w, 3]."""
    if pixels.ndim != 4:
        return _fitted(checked_image(pixels), largest)
    strip = [_fitted(image, largest) for image in spread_frames(checked_video(pixels), frames)]
    gap = np.full((strip[0].shape[0], _FRAME_GAP, 3), 255, np.uint8)
    return np.concatenate([part for image in strip for part in (gap, image)][1:], axis=1)


def _fitted(image: Pixels, largest: int) -> Pixels:
    longest = max(image.shape[:2])
    factor = min(READABLE, largest) // longest
    if factor > 1:
        return image.repeat(factor, axis=0).repeat(factor, axis=1)
    return _scaled(image, largest / longest)


def _scaled(image: Pixels, factor: float) -> Pixels:
    """Scaled down by `factor`; as it is when that is 1 or more."""
    if factor >= 1:
        return image
    height, width = (max(1, round(side * factor)) for side in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def _squarest(count: int, width: int) -> int:
    columns = math.ceil(math.sqrt(count))
    return max(1, min(columns, 4096 // (width + _GAP)))


def _caption(cell: Cell, width: int) -> list[tuple[str, tuple[int, int, int]]]:
    lines = [(line, _INK) for line in wrapped(cell.caption, width, CAPTION_LINES)]
    return lines + [(line, _NOTE_INK) for line in wrapped(cell.note, width, 1)]


def wrapped(text: str, width: int, lines: int) -> list[str]:
    """`text` in at most `lines` lines of `width` pixels in the caption's font, the last ending with `...` when
    something is left out. White space of any kind separates words; longer words are broken."""
    fits = _font(12).getlength
    words = _plain(text)[: lines * width].split()  # a glyph is a pixel wide at least
    done: list[str] = []
    line = ""
    while words:
        word = words.pop(0)
        joined = f"{line} {word}" if line else word
        if fits(joined) <= width:
            line = joined
        elif line:
            words.insert(0, word)
            done.append(line)
            line = ""
        else:
            size = next((n for n in range(len(word) - 1, 1, -1) if fits(word[:n]) <= width), 1)
            done.append(word[:size])
            words.insert(0, word[size:])
        if len(done) == lines:
            break
    else:
        return [*done, line] if line else done
    last = done[-1]
    while last and fits(last + "...") > width:
        last = last[:-1]
    return [*done[:-1], last.rstrip() + "..."]


def _plain(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
