"""What Megatron must know of a text model, out of its Hugging Face config. Imports neither torch nor megatron."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from mmrl_core.errors import ModelError

Family = Literal["llama", "qwen2", "qwen3"]

FAMILIES: tuple[Family, ...] = ("llama", "qwen2", "qwen3")

_ABSENT_KV_HEADS: dict[Family, int | None] = {"llama": None, "qwen2": 32, "qwen3": 32}
"""What transformers takes for a config without `num_key_value_heads`; None: as many as heads."""

_ABSENT_HEAD_DIM: dict[Family, int | None] = {"llama": None, "qwen2": None, "qwen3": 128}
"""What transformers takes for a config without `head_dim`; None: hidden size / heads."""

_ABSENT_POSITIONS: dict[Family, int] = {"llama": 2048, "qwen2": 32768, "qwen3": 32768}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder with RMSNorm before attention and MLP, SwiGLU, rotary positions and grouped-query attention."""

    family: Family
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    """Given explicitly: it need not be hidden / heads."""
    ffn: int
    """Rows of the gate projection, and of the up projection."""
    vocab: int
    """Rows of the embedding, without padding."""
    tied: bool
    """The output layer is the embedding."""
    qkv_bias: bool
    qk_norm: bool
    """An RMSNorm over head_dim on queries and keys."""
    norm_eps: float
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None
    """The scaling of rotary frequencies as transformers describes it, with `rope_type`; None: not scaled."""
    max_positions: int


def architecture(config: Mapping[str, Any], where: str) -> Architecture:
    """Read the content of a config.json, of transformers 4 or 5.

    Args:
        where: the file or folder, for errors.

    Raises:
        ModelError: the field and its value, for what is missing or what a Megatron GPTModel cannot express.
    """
    name = config.get("model_type")
    if name not in FAMILIES:
        raise ModelError(
            f"{where}: model_type {name!r} is none of {', '.join(FAMILIES)}, which Megatron's GPTModel is built for"
        )
    family = cast(Family, name)
    _refuse(config, where)
    hidden = _count(config, "hidden_size", where)
    heads = _count(config, "num_attention_heads", where)
    kv_heads = _optional(config, "num_key_value_heads", where, _ABSENT_KV_HEADS[family]) or heads
    head_dim = _optional(config, "head_dim", where, _ABSENT_HEAD_DIM[family])
    if head_dim is None:
        if hidden % heads:
            raise ModelError(f"{where}: hidden_size {hidden} is no multiple of num_attention_heads {heads}")
        head_dim = hidden // heads
    if heads % kv_heads:
        raise ModelError(f"{where}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    theta, scaling = _rope(config, where)
    return Architecture(
        family=family,
        layers=_count(config, "num_hidden_layers", where),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=_count(config, "intermediate_size", where),
        vocab=_count(config, "vocab_size", where),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        max_positions=_optional(config, "max_position_embeddings", where, None) or _ABSENT_POSITIONS[family],
    )


def _refuse(config: Mapping[str, Any], where: str) -> None:
    """What changes the numbers and has no place in a GPTModel."""
    reasons = {
        "attention_bias": "a bias on the output projection too",
        "mlp_bias": "a bias on the MLP",
        "use_sliding_window": "sliding-window attention",
        "quantization_config": "quantized weights",
    }
    for field, reason in reasons.items():
        if config.get(field):
            raise ModelError(f"{where}: {field} = {config[field]!r} asks for {reason}, which is not supported here")
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelError(f"{where}: hidden_act = {activation!r}; only silu (SwiGLU) is supported")
    others = sorted({str(kind) for kind in config.get("layer_types") or () if kind != "full_attention"})
    if others:
        raise ModelError(f"{where}: layer_types has {', '.join(others)}; only full_attention is supported")


def _rope(config: Mapping[str, Any], where: str) -> tuple[float, Mapping[str, Any] | None]:
    """(theta, scaling or None), from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise ModelError(f"{where}: rope_parameters = {given!r} is no mapping")
    values = dict(given)
    theta = values.pop("rope_theta", None)
    theta = config.get("rope_theta", 10000.0) if theta is None else theta
    kind = values.pop("rope_type", None) or values.pop("type", None) or "default"
    values.pop("type", None)
    partial = values.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ModelError(f"{where}: partial_rotary_factor = {partial!r}; only full rotary embeddings are supported")
    if kind == "default":
        return float(theta), None
    return float(theta), {"rope_type": kind, **values}


def _count(config: Mapping[str, Any], field: str, where: str) -> int:
    value = _optional(config, field, where, None)
    if value is None:
        raise ModelError(f"{where}: {field} is missing")
    return value


def _optional(config: Mapping[str, Any], field: str, where: str, absent: int | None) -> int | None:
    value = config.get(field)
    if value is None:
        return absent
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{where}: {field} = {value!r} is no positive whole number")
    return value
