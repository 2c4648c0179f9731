"""HPSv2's score once more, from its published parts and in float64, sharing nothing with the package: PyTorch's own
attention fed with the fused weights, bicubic scaling written out, byte pairs joined one by one."""

from __future__ import annotations

import html
import itertools
import math
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np
import PIL
import torch
from hpsv2_tiny import MERGES, byte_characters, vocabulary
from torch import Tensor, nn
from torch.nn import functional

PILLOW = int(PIL.__version__.partition(".")[0])

# -------------------------------------------------------------------------------------------------------------- network


def towers(state: Mapping[str, Tensor], pixels: Tensor, ids: Tensor, *, vision_heads: int, text_heads: int) -> Tensor:
    """Cosine of each image [n, 3, S, S] with the prompt of the same row [n, context]; float64."""
    w = {name: tensor.double() for name, tensor in state.items()}
    patch = w["visual.conv1.weight"].shape[-1]
    x = functional.conv2d(pixels.double(), w["visual.conv1.weight"], stride=patch).flatten(2).transpose(1, 2)
    x = torch.cat([w["visual.class_embedding"].expand(len(x), 1, -1), x], dim=1) + w["visual.positional_embedding"]
    x = _blocks(w, "visual.transformer", _norm(w, "visual.ln_pre", x), vision_heads, None)
    image = _norm(w, "visual.ln_post", x)[:, 0] @ w["visual.proj"]
    t = w["token_embedding.weight"][ids] + w["positional_embedding"]
    ahead = torch.full((ids.shape[1], ids.shape[1]), -math.inf, dtype=torch.float64).triu(1)
    t = _norm(w, "ln_final", _blocks(w, "transformer", t, text_heads, ahead))
    end = ids.argmax(dim=1)
    text = torch.stack([row[i] for row, i in zip(t, end, strict=True)]) @ w["text_projection"]
    return torch.diagonal((image / image.norm(dim=1, keepdim=True)) @ (text / text.norm(dim=1, keepdim=True)).T)


def _blocks(w: Mapping[str, Tensor], prefix: str, x: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    layer = 0
    while f"{prefix}.resblocks.{layer}.ln_1.weight" in w:
        name = f"{prefix}.resblocks.{layer}"
        attention = nn.MultiheadAttention(x.shape[-1], heads, batch_first=True, dtype=torch.float64)
        inside = f"{name}.attn."
        attention.load_state_dict({k.removeprefix(inside): v for k, v in w.items() if k.startswith(inside)})
        h = _norm(w, f"{name}.ln_1", x)
        x = x + attention(h, h, h, need_weights=False, attn_mask=mask)[0]
        h = _norm(w, f"{name}.ln_2", x) @ w[f"{name}.mlp.c_fc.weight"].T + w[f"{name}.mlp.c_fc.bias"]
        h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
        x = x + h @ w[f"{name}.mlp.c_proj.weight"].T + w[f"{name}.mlp.c_proj.bias"]
        layer += 1
    return x


def _norm(w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return (
        centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]
    )


# --------------------------------------------------------------------------------------------------------------- pixels


def square(image: np.ndarray, size: int) -> np.ndarray:
    """[size, size, 3] uint8: the longest side scaled to `size`, centred on black.

    Rounding to 8 bits between the axes makes their order matter: Pillow 13 begins with the one that shrinks more.
    """
    longest = max(image.shape[:2])
    height, width = (round(side / (longest / size)) for side in image.shape[:2])
    order = [(1, width), (0, height)]
    if PILLOW >= 13 and image.shape[0] - height > max(0, 2 * (image.shape[1] - width)):
        order.reverse()
    small = image
    for axis, length in order:
        small = _scaled(small, length, axis)
    above, before = (size - height) // 2, (size - width) // 2
    return np.pad(small, ((above, size - height - above), (before, size - width - before), (0, 0)))


def _scaled(image: np.ndarray, length: int, axis: int) -> np.ndarray:
    """One axis, by Keys' cubic (a = -1/2) stretched to the scale when shrinking, with weights and sums of 22 binary
    digits, rounded to 8 bits."""
    old = image.shape[axis]
    if old == length:
        return image
    step = old / length
    stretch = max(step, 1.0)
    matrix = np.zeros((length, old), dtype=np.int64)
    for i in range(length):
        centre = (i + 0.5) * step
        first, last = max(0, int(centre - 2 * stretch + 0.5)), min(old, int(centre + 2 * stretch + 0.5))
        weights = np.array([_cubic((j + 0.5 - centre) / stretch) for j in range(first, last)])
        fixed = weights / weights.sum() * 2**22
        matrix[i, first:last] = np.trunc(fixed + np.copysign(0.5, fixed))
    mixed = np.moveaxis(np.tensordot(matrix, image.astype(np.int64), (1, axis)), 0, axis)
    return np.clip((mixed + 2**21) >> 22, 0, 255).astype(np.uint8)


def _cubic(x: float) -> float:
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def pixels(image: np.ndarray, size: int) -> Tensor:
    """[3, size, size] float64, normalised."""
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    deviation = np.array([0.26862954, 0.26130258, 0.27577711])
    return torch.from_numpy(((square(image, size) / 255 - mean) / deviation).transpose(2, 0, 1).copy())


# --------------------------------------------------------------------------------------------------------------- tokens


def token_ids(text: str, context: int = 77) -> list[int]:
    """Start, the text's tokens, end, zeros."""
    known = vocabulary()
    text = unicodedata.normalize("NFC", " ".join(html.unescape(html.unescape(text)).split()).lower())
    found = [known[token] for word in _words(text) for token in _byte_pairs(word)]
    ids = [known["<|startoftext|>"], *found[: context - 2], known["<|endoftext|>"]]
    return ids + [0] * (context - len(ids))


def _words(text: str) -> list[str]:
    """English contractions, runs of letters, single numerals, runs of anything else that is not white space."""
    words, i = [], 0
    while i < len(text):
        contraction = next((c for c in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d") if text.startswith(c, i)), None)
        kind = _kind(text[i])
        end = i + (len(contraction) if contraction else 1)
        while contraction is None and kind in ("letter", "other") and end < len(text) and _kind(text[end]) == kind:
            end += 1
        if kind != "space":
            words.append(text[i:end])
        i = end
    return words


def _kind(character: str) -> str:
    if character.isspace():
        return "space"
    return {"L": "letter", "N": "numeral"}.get(unicodedata.category(character)[0], "other")


def _byte_pairs(word: str) -> Sequence[str]:
    characters = byte_characters()
    parts = [characters[byte] for byte in word.encode()]
    parts[-1] += "</w>"
    order = {tuple(merge.split()): rank for rank, merge in enumerate(MERGES)}
    while True:
        pairs = [(order[pair], i) for i, pair in enumerate(itertools.pairwise(parts)) if pair in order]
        if not pairs:
            return parts
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


# ---------------------------------------------------------------------------------------------------------------- score


def scores(
    state: Mapping[str, Tensor],
    images: Sequence[np.ndarray],
    texts: Sequence[str],
    *,
    size: int,
    heads: tuple[int, int],
) -> list[float]:
    """The score of each image with the text of the same position; `heads` of the image and the text tower."""
    inputs = torch.stack([pixels(image, size) for image in images])
    ids = torch.tensor([token_ids(text) for text in texts])
    return towers(state, inputs, ids, vision_heads=heads[0], text_heads=heads[1]).tolist()
