"""From open_clip's parameters to transformers' `CLIPModel`: shapes, names, and the two towers' features.

The network is open_clip's CLIP with a vision transformer: pre-norm blocks, exact GELU, a causal text tower whose
feature is taken at the end-of-text token, both features projected without bias.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel

from mmrl_core.errors import RewardError
from mmrl_hpsv2.checkpoint import DOWNLOAD

_EPS = 1e-5
_SHOWN = 4
"""Names in an error; more are counted."""


@dataclass(frozen=True, kw_only=True)
class Tower:
    """One transformer."""

    prefix: str
    """Where its blocks are in the checkpoint."""
    width: int
    layers: int
    heads: int
    mlp: int


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Everything that makes the network."""

    vision: Tower
    text: Tower
    embed: int
    """Width of the features that are compared."""
    patch: int
    image: int
    """Pixels on a side."""
    vocabulary: int
    context: int
    """Tokens of a prompt, both ends included."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of the checkpoint, and the parameters it becomes."""

    name: str
    shape: tuple[int, ...]
    targets: tuple[str, ...]
    """Several: cut into as many equal parts along the first dimension."""
    transposed: bool = False


# ------------------------------------------------------------------------------------------------------------ the shape


def shape_of(
    state: Mapping[str, Tensor], path: Path, *, vision_head_width: int | None, text_heads: int | None
) -> Shape:  # fmt: skip
    """The network that `state` (open_clip names) belongs to. The heads are not in the shapes: they are given, or
    known for the published widths. Raises RewardError."""
    width, _, patch, _ = _dimensions(state, path, "visual.conv1.weight", 4)
    patches = _dimensions(state, path, "visual.positional_embedding", 2)[0] - 1
    side = math.isqrt(max(patches, 0))
    if side < 1 or side * side != patches:
        raise RewardError(
            f"checkpoint {path}: 'visual.positional_embedding' has {patches + 1} rows, which is not one more than a "
            f"square: no square image has so many patches. {DOWNLOAD}"
        )
    vocabulary, text_width = _dimensions(state, path, "token_embedding.weight", 2)
    context = _dimensions(state, path, "positional_embedding", 2)[0]
    if vision_head_width is None:
        vision_head_width = _known(path, "image", width, {1280: 80}, "vision_head_width", "width of a head")
    if text_heads is None:
        text_heads = _known(path, "text", text_width, {1024: 16}, "text_heads", "number of heads")
    if width % vision_head_width:
        raise RewardError(
            f"vision_head_width {vision_head_width} does not divide the width {width} of the image tower in {path}"
        )
    if text_width % text_heads:
        raise RewardError(f"text_heads {text_heads} does not divide the width {text_width} of the text tower in {path}")
    return Shape(
        vision=_tower(state, path, "visual.transformer", width, width // vision_head_width),
        text=_tower(state, path, "transformer", text_width, text_heads),
        embed=_dimensions(state, path, "visual.proj", 2)[1],
        patch=patch,
        image=side * patch,
        vocabulary=vocabulary,
        context=context,
    )


def _tower(state: Mapping[str, Tensor], path: Path, prefix: str, width: int, heads: int) -> Tower:
    pattern = re.compile(rf"{re.escape(prefix)}\.resblocks\.(\d+)\.")
    layers = len({found[1] for found in map(pattern.match, state) if found})
    mlp = _dimensions(state, path, f"{prefix}.resblocks.0.mlp.c_fc.weight", 2)[0]
    return Tower(prefix=prefix, width=width, layers=layers, heads=heads, mlp=mlp)


def _dimensions(state: Mapping[str, Tensor], path: Path, name: str, count: int) -> tuple[int, ...]:
    if name not in state:
        raise RewardError(
            f"checkpoint {path} is not one of HPSv2: it has no {name!r} (it has {_some(list(state))}). {DOWNLOAD}"
        )
    shape = tuple(state[name].shape)
    if len(shape) != count:
        raise RewardError(f"checkpoint {path}: {name!r} has shape {shape}; {count} dimensions expected. {DOWNLOAD}")
    return shape


def _known(path: Path, tower: str, width: int, known: Mapping[int, int], option: str, what: str) -> int:
    if width not in known:
        published = ", ".join(str(w) for w in known)
        raise RewardError(
            f"checkpoint {path}: the {tower} tower is {width} wide (published: {published}), and nothing in the file "
            f"says the {what}. Cure: give the option {option}"
        )
    return known[width]


# ------------------------------------------------------------------------------------------------------------ the names


def entries(shape: Shape) -> Iterator[Entry]:
    """Every tensor that a checkpoint of this network has."""
    vision, text, embed = shape.vision.width, shape.text.width, shape.embed
    embeddings, words = "vision_model.embeddings", "text_model.embeddings"
    positions = (shape.image // shape.patch) ** 2 + 1
    patch = (vision, 3, shape.patch, shape.patch)
    yield Entry(name="logit_scale", shape=(), targets=("logit_scale",))
    yield Entry(name="visual.class_embedding", shape=(vision,), targets=(f"{embeddings}.class_embedding",))
    yield Entry(name="visual.conv1.weight", shape=patch, targets=(f"{embeddings}.patch_embedding.weight",))
    yield _table("visual.positional_embedding", (positions, vision), f"{embeddings}.position_embedding")
    yield _table("positional_embedding", (shape.context, text), f"{words}.position_embedding")
    yield _table("token_embedding.weight", (shape.vocabulary, text), f"{words}.token_embedding")
    yield _table("visual.proj", (vision, embed), "visual_projection", transposed=True)
    yield _table("text_projection", (text, embed), "text_projection", transposed=True)
    yield from _with_bias("visual.ln_pre", (vision,), "vision_model.pre_layrnorm")
    yield from _with_bias("visual.ln_post", (vision,), "vision_model.post_layernorm")
    yield from _with_bias("ln_final", (text,), "text_model.final_layer_norm")
    for tower, model in ((shape.vision, "vision_model"), (shape.text, "text_model")):
        for layer in range(tower.layers):
            yield from _block(tower, f"{tower.prefix}.resblocks.{layer}", f"{model}.encoder.layers.{layer}")


def _block(tower: Tower, source: str, target: str) -> Iterator[Entry]:
    width, parts = tower.width, [f"{target}.self_attn.{part}_proj" for part in "qkv"]
    for name, shape in (("weight", (3 * width, width)), ("bias", (3 * width,))):
        yield Entry(name=f"{source}.attn.in_proj_{name}", shape=shape, targets=tuple(f"{p}.{name}" for p in parts))
    yield from _with_bias(f"{source}.attn.out_proj", (width, width), f"{target}.self_attn.out_proj")
    yield from _with_bias(f"{source}.ln_1", (width,), f"{target}.layer_norm1")
    yield from _with_bias(f"{source}.ln_2", (width,), f"{target}.layer_norm2")
    yield from _with_bias(f"{source}.mlp.c_fc", (tower.mlp, width), f"{target}.mlp.fc1")
    yield from _with_bias(f"{source}.mlp.c_proj", (width, tower.mlp), f"{target}.mlp.fc2")


def _table(name: str, shape: tuple[int, ...], target: str, *, transposed: bool = False) -> Entry:
    return Entry(name=name, shape=shape, targets=(f"{target}.weight",), transposed=transposed)


def _with_bias(source: str, shape: tuple[int, ...], target: str) -> Iterator[Entry]:
    yield Entry(name=f"{source}.weight", shape=shape, targets=(f"{target}.weight",))
    yield Entry(name=f"{source}.bias", shape=shape[:1], targets=(f"{target}.bias",))


def renamed(state: Mapping[str, Tensor], path: Path, shape: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    """The checkpoint under transformers' names, copied as `dtype`. Raises RewardError unless `state` holds exactly
    the tensors of `shape`."""
    table = {entry.name: entry for entry in entries(shape)}
    missing = [name for name in table if name not in state]
    unexpected = [name for name in state if name not in table]
    wrong = [
        f"{name!r} has shape {tuple(state[name].shape)}, expected {entry.shape}"
        for name, entry in table.items()
        if name in state and tuple(state[name].shape) != entry.shape
    ]
    problems = [f"missing: {_some(missing)}"] if missing else []
    problems += [f"unexpected: {_some(unexpected)}"] if unexpected else []
    problems += wrong[:_SHOWN]
    if problems:
        raise RewardError(f"checkpoint {path} is not one of HPSv2: {'; '.join(problems)}. {DOWNLOAD}")
    weights = {}
    for name, entry in table.items():
        tensor = state[name].mT if entry.transposed else state[name]
        parts = tensor.chunk(len(entry.targets)) if len(entry.targets) > 1 else (tensor,)
        for target, part in zip(entry.targets, parts, strict=True):
            weights[target] = part.to(dtype, copy=True, memory_format=torch.contiguous_format)
    return weights


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(repr(name) for name in names[:_SHOWN]) or "nothing") + more


# ---------------------------------------------------------------------------------------------------------- the network


def build(shape: Shape, weights: dict[str, Tensor]) -> CLIPModel:
    """The network with these weights (every parameter, under transformers' names), for inference."""
    config = CLIPConfig(
        projection_dim=shape.embed,
        vision_config={**_tower_config(shape.vision), "image_size": shape.image, "patch_size": shape.patch},
        text_config={
            **_tower_config(shape.text),
            "vocab_size": shape.vocabulary,
            "max_position_embeddings": shape.context,
            "bos_token_id": shape.vocabulary - 2,
            "eos_token_id": shape.vocabulary - 1,
        },
    )
    with torch.device("meta"):  # neither memory nor time for weights that are replaced
        network = CLIPModel(config)
    network.load_state_dict(weights, strict=True, assign=True)
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            assert name == "position_ids", name
            positions = torch.arange(buffer.shape[-1]).unsqueeze(0)
            module.register_buffer(name, positions, persistent=False)
    embeddings = network.vision_model.embeddings
    embeddings.patch_embedding = PatchProduct(embeddings.patch_embedding.weight)
    return network.eval().requires_grad_(False)


class PatchProduct(nn.Module):
    """The patch embedding as a matrix product. A convolution in fp32 is computed in TF32 by default on some devices,
    which alone would move scores by up to 1e-4."""

    def __init__(self, weight: nn.Parameter) -> None:
        """`weight` is the convolution's, [width, 3, patch, patch]."""
        super().__init__()
        self.weight = weight

    def forward(self, pixels: Tensor) -> Tensor:
        """[n, 3, H, W] -> [n, width, H / patch, W / patch]."""
        size = self.weight.shape[-1]
        count, channels, height, width = pixels.shape
        cut = pixels.reshape(count, channels, height // size, size, width // size, size)
        rows = cut.permute(0, 2, 4, 1, 3, 5).flatten(3)  # [n, H / patch, W / patch, 3 * patch * patch]
        return functional.linear(rows, self.weight.flatten(1)).permute(0, 3, 1, 2)


def _tower_config(tower: Tower) -> dict[str, object]:
    return {
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "hidden_act": "gelu",
        "layer_norm_eps": _EPS,
        "attention_dropout": 0.0,
    }


def image_features(network: CLIPModel, pixels: Tensor) -> Tensor:
    """[n, 3, image, image] normalised pixels -> [n, embed] fp32, of length 1."""
    pooled = network.vision_model(pixel_values=pixels).pooler_output
    return functional.normalize(network.visual_projection(pooled).float(), dim=-1)


def text_features(network: CLIPModel, ids: Tensor) -> Tensor:
    """[n, context] token ids, on the CPU -> [n, embed] fp32, of length 1.

    The feature is that of the highest id's first position (the end-of-text token), as in open_clip; transformers'
    own pooling depends on a field of the configuration.
    """
    device = network.text_projection.weight.device
    states = network.text_model(input_ids=ids.to(device)).last_hidden_state
    at_end = states[torch.arange(len(ids), device=device), ids.argmax(dim=-1).to(device)]
    return functional.normalize(network.text_projection(at_end).float(), dim=-1)
