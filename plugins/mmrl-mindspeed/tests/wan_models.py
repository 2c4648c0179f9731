"""Small Wan transformers written by diffusers: text to video, image to video with and without image embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

TINY: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 3,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}

WANS: dict[str, dict[str, Any]] = {
    "wan2.1-t2v": {},
    "wan2.1-i2v": {"in_channels": 12, "image_dim": 20, "added_kv_proj_dim": 24},
    "wan2.1-flf2v": {"in_channels": 12, "image_dim": 20, "added_kv_proj_dim": 24, "pos_embed_seq_len": 6},
    "wan2.2-i2v": {"in_channels": 12},
}


def write_wan(folder: Path, name: str, dtype: torch.dtype = torch.float32, shard: str = "10GB") -> Path:
    """A folder that diffusers wrote, every parameter random."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(sorted(WANS).index(name))
    network = WanTransformer3DModel(**{**TINY, **WANS[name]})
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    network.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder
