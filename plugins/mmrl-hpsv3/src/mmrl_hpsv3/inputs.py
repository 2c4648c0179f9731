"""From images and prompts to what Qwen2-VL takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmrl_core.media.images import Pixels
from mmrl_hpsv3.base import Base
from mmrl_hpsv3.pictures import UnusableSampleError, resized
from mmrl_hpsv3.prompt import REWARD_TOKEN, render


@dataclass(frozen=True, kw_only=True)
class Row:
    """One image with its prompt."""

    token_ids: Sequence[int]
    """[L]: system message, image, instruction with the prompt and the reward token, beginning of an answer."""
    patches: Tensor
    """[P, 3 * 2 * 14 * 14] float32: normalised patches, those of a merged patch adjacent."""
    grid: Tensor
    """[1, 3] int64: (1, patches down, patches across); P is their product."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Rows as one batch, filled up on the right."""

    token_ids: Tensor
    """[B, L] int64."""
    attention_mask: Tensor
    """[B, L] int64: 1 up to the row's end."""
    patches: Tensor
    """[sum of P, 3 * 2 * 14 * 14] float32."""
    grids: Tensor
    """[B, 3] int64."""


def encode(base: Base, pixels: Pixels, prompt: str) -> Row:
    """Tokens and patches of an image [H, W, 3] and its prompt.

    The image is resized here, once, as the hpsv3 package does before its processor; that processor's own limits, which
    the published preprocessor_config.json sets wide enough to change nothing, are not applied.

    Raises UnusableSampleError for an image or a prompt that HPSv3 cannot take.
    """
    image = resized(pixels)
    cut = base.image_processor(images=[image], do_resize=False, return_tensors="pt")
    grid = cut["image_grid_thw"]
    image_tokens = int(grid.prod()) // base.image_processor.merge_size**2
    token_ids = base.tokenizer(render(prompt, image_tokens))["input_ids"]
    _check_tokens(base, token_ids, image_tokens)
    return Row(token_ids=token_ids, patches=cut["pixel_values"], grid=grid)


def _check_tokens(base: Base, token_ids: Sequence[int], image_tokens: int) -> None:
    if token_ids.count(base.reward_id) != 1:
        raise UnusableSampleError(f"the prompt holds HPSv3's own token {REWARD_TOKEN}")
    if token_ids.count(base.image_id) != image_tokens or base.config.video_token_id in token_ids:
        raise UnusableSampleError("the prompt holds Qwen2-VL's own token for an image or a video")
    longest = base.config.text_config.max_position_embeddings
    if len(token_ids) > longest:
        raise UnusableSampleError(f"the prompt makes {len(token_ids)} tokens; Qwen2-VL takes {longest}")


def collate(rows: Sequence[Row], pad_id: int) -> Inputs:
    """Rows as one batch."""
    longest = max(len(row.token_ids) for row in rows)
    token_ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(rows), longest), dtype=torch.int64)
    for index, row in enumerate(rows):
        token_ids[index, : len(row.token_ids)] = torch.tensor(row.token_ids, dtype=torch.int64)
        attention_mask[index, : len(row.token_ids)] = 1
    return Inputs(
        token_ids=token_ids,
        attention_mask=attention_mask,
        patches=torch.cat([row.patches for row in rows]),
        grids=torch.cat([row.grid for row in rows]),
    )
