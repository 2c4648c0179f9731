"""What MindSpeed-MM calls the weights of a Wan transformer (text to video and image to video), and diffusers too.

The names are those of MindSpeed-MM's own converter (`checkpoint/sora_model/wan_converter.py` there).
"""

from __future__ import annotations

import re
from collections.abc import Collection

from mmrl_core.errors import ModelError

_OUTSIDE = {
    "patch_embedding": "patch_embedding",
    "condition_embedder.text_embedder.linear_1": "text_embedding.linear_1",
    "condition_embedder.text_embedder.linear_2": "text_embedding.linear_2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "proj_out": "head.head",
}
"""diffusers -> MindSpeed-MM, modules outside the blocks; `.weight` and `.bias` follow."""

_WHOLE = {
    "scale_shift_table": "head.modulation",
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
}
"""Parameters outside the blocks."""

_INSIDE = {
    "attn1.to_q": "self_attn.proj_q",
    "attn1.to_k": "self_attn.proj_k",
    "attn1.to_v": "self_attn.proj_v",
    "attn1.to_out.0": "self_attn.proj_out",
    "attn1.norm_q": "self_attn.q_norm",
    "attn1.norm_k": "self_attn.k_norm",
    "attn2.to_q": "cross_attn.proj_q",
    "attn2.to_k": "cross_attn.proj_k",
    "attn2.to_v": "cross_attn.proj_v",
    "attn2.to_out.0": "cross_attn.proj_out",
    "attn2.norm_q": "cross_attn.q_norm",
    "attn2.norm_k": "cross_attn.k_norm",
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "attn2.norm_added_k": "cross_attn.k_norm_img",
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
"""Modules inside a block."""

_INSIDE_WHOLE = {"scale_shift_table": "modulation"}

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")

_ANCHOR = "patch_embedding.weight"
_TELLING = ("text_embedding.linear_1.weight", "head.head.weight", "blocks.0.self_attn.proj_q.weight", "head.modulation")


def is_wan(names: object) -> bool:
    """Whether the names of a checkpoint's tensors are those of a Wan transformer of MindSpeed-MM."""
    return isinstance(names, Collection) and any(str(name).endswith(_TELLING) for name in names)


def prefix_of(names: Collection[str]) -> str | None:
    """What stands before all names, found by the patch embedding's; None when there is none or several."""
    found = {name.removesuffix(_ANCHOR) for name in names if name.endswith(_ANCHOR) and not name.startswith("optim")}
    return found.pop() if len(found) == 1 else None


def to_mindspeed(name: str, where: str) -> str:
    """MindSpeed-MM's name for a weight of diffusers. Raises ModelError for one that no Wan transformer has."""
    return _translate(name, _OUTSIDE, _WHOLE, _INSIDE, _INSIDE_WHOLE, where)


def to_diffusers(name: str, where: str) -> str:
    """diffusers' name for a weight of MindSpeed-MM. Raises ModelError for one that no Wan transformer has."""
    return _translate(name, _flip(_OUTSIDE), _flip(_WHOLE), _flip(_INSIDE), _flip(_INSIDE_WHOLE), where)


def block_of(name: str) -> int | None:
    """The index of the block that a weight is in, or None."""
    found = _BLOCK.fullmatch(name)
    return int(found[1]) if found else None


def in_block(name: str, index: int) -> str:
    """The same weight of another block."""
    return re.sub(r"^blocks\.\d+\.", f"blocks.{index}.", name)


def _flip(table: dict[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in table.items()}


def _translate(
    name: str,
    outside: dict[str, str],
    whole: dict[str, str],
    inside: dict[str, str],
    inside_whole: dict[str, str],
    where: str,
) -> str:
    block = _BLOCK.fullmatch(name)
    start, rest = (f"blocks.{block[1]}.", block[2]) if block else ("", name)
    parameters, modules = (inside_whole, inside) if block else (whole, outside)
    if rest in parameters:
        return start + parameters[rest]
    module, _, leaf = rest.rpartition(".")
    if module not in modules or leaf not in ("weight", "bias"):
        raise ModelError(f"{where}: {name} is no weight of a Wan transformer")
    return f"{start}{modules[module]}.{leaf}"
