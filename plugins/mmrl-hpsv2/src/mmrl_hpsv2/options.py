"""Options, checked when a recipe is read. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mmrl_core.recipe import Positive, Spec

Location = Annotated[str, Field(min_length=1)]


class HpsV2Options(Spec):
    """Options of `hpsv2`."""

    checkpoint: Location
    """Path of `HPS_v2.1_compressed.pt` (or `HPS_v2_compressed.pt`) from the Hugging Face repository xswu/HPSv2, or of
    a .safetensors file with the same tensors."""
    tokenizer: Location
    """Folder with CLIP's tokenizer: the `tokenizer` folder of a FLUX.1 or SD3 checkpoint, or any CLIP model folder."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the network. Scores within a group differ by about 0.01, which bfloat16 can blur."""
    images_per_forward: Positive = 16
    """Images or frames that go through the network at once; bounds the memory."""
    video: Literal["first", "mean"] = "first"
    """How a video is scored: its first frame, or the mean over every `every`-th frame, beginning with the first."""
    every: Positive = 4
    """Distance between the scored frames with `video: mean`; 1 scores all of them."""
    scale: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Factor on the score."""
    fix_text: bool = False
    """Repair prompts with ftfy first, as open_clip's tokenizer does; needs `pip install 'mmrl-hpsv2[ftfy]'`. Plain
    ASCII prompts are the same either way."""
    vision_head_width: Positive | None = None
    """Width of an attention head in the image tower, which a checkpoint does not say; null: 80 when the tower is 1280
    wide (ViT-H-14, the published checkpoints), else an error."""
    text_heads: Positive | None = None
    """Attention heads in the text tower; null: 16 when the tower is 1024 wide (ViT-H-14), else an error."""
