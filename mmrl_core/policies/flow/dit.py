"""A small class-conditional diffusion transformer on pixels, and its folder format.

The folder is laid out as diffusers does: `model_index.json`, `transformer/` with `config.json` and
`diffusion_pytorch_model.safetensors`, `scheduler/scheduler_config.json` with the schedule's `shift`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from mmrl_core.errors import DataError, ModelError, RecipeError
from mmrl_core.policies.flow.diffusers_folder import INDEX, read_json
from mmrl_core.policies.flow.family import Conditions, Family
from mmrl_core.policies.flow.latent_sizes import one_frame
from mmrl_core.policies.flow.pixels import to_pixels
from mmrl_core.recipe import Positive, Spec

if TYPE_CHECKING:
    from mmrl_core.policies.flow.options import FlowSampling

PIPELINE = "ClassConditionalDiTPipeline"
WEIGHTS = "diffusion_pytorch_model.safetensors"
MAX_PERIOD = 10_000.0
"""Longest period of the sinusoidal embedding of 1000 sigma."""


class DitConfig(Spec):
    """`transformer/config.json`."""

    sample_size: Positive
    """Height and width in pixels."""
    channels: Positive = 1
    """1: grey, 3: RGB."""
    patch_size: Positive = 2
    """Height and width of a token in pixels."""
    width: Positive
    """Features of a token."""
    depth: Positive
    """Blocks."""
    heads: Positive
    """Attention heads."""
    classes: list[str]
    """The word of each class, by index."""

    @model_validator(mode="after")
    def _consistent(self) -> DitConfig:
        if self.channels not in (1, 3):
            raise ValueError(f"channels is {self.channels}; it must be 1 (grey) or 3 (RGB)")
        if self.sample_size % self.patch_size:
            raise ValueError(f"sample_size {self.sample_size} is no multiple of patch_size {self.patch_size}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} is no multiple of twice the heads ({self.heads})")
        odd = [word for word in self.classes if not re.fullmatch(r"\w+", word)]
        if odd or not self.classes or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"classes {self.classes} must be single words, all different")
        return self


class Block(nn.Module):
    """Attention and a two-layer perceptron, each scaled, shifted and gated by the condition (adaLN-zero).

    Peebles and Xie, "Scalable diffusion models with transformers", 2023, arXiv:2212.09748.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        """Tokens [b, n, width] -> [b, n, width]. `condition`: [b, width], the activation already applied."""
        modulation = self.modulation(condition).unsqueeze(1)
        scale, shift, gate, scale_mlp, shift_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        b, n, width = hidden.shape
        normed = torch.addcmul(shift, self.norm(hidden), scale + 1)
        query, key, value = self.qkv(normed).view(b, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        hidden = torch.addcmul(hidden, gate, self.out(mixed.transpose(1, 2).reshape(b, n, width)))
        normed = torch.addcmul(shift_mlp, self.norm(hidden), scale_mlp + 1)
        return torch.addcmul(hidden, gate_mlp, self.down(functional.gelu(self.up(normed))))


class ClassConditionalDiT(nn.Module):
    """Predicts the velocity of pixels [b, channels, size, size] at sigma, given a class."""

    frequencies: Tensor

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        self.config = config
        width, patch = config.width, config.channels * config.patch_size**2
        self.side = config.sample_size // config.patch_size
        self.patch_in = nn.Linear(patch, width)
        self.position = nn.Parameter(torch.empty(1, self.side**2, width))
        self.time_in = nn.Linear(width, width)
        self.time_out = nn.Linear(width, width)
        self.label = nn.Embedding(len(config.classes) + 1, width)
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.patch_out = nn.Linear(width, patch)
        exponent = torch.arange(width // 2, dtype=torch.float64) / (width // 2)
        self.register_buffer("frequencies", (1000 * MAX_PERIOD**-exponent).float(), persistent=False)
        self._reset()

    def _reset(self) -> None:
        """What adaLN-zero asks for: every block starts as the identity and the output as 0."""
        nn.init.normal_(self.position, std=0.02)
        for layer in (*(block.modulation for block in self.blocks), self.modulation, self.patch_out):
            assert isinstance(layer, nn.Linear)
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, pixels: Tensor, time: Tensor, label: Tensor) -> Tensor:
        """Velocity [b, C, H, W] in the weights' precision of pixels [b, C, H, W] at sigma `time` [b] fp32, for class
        `label` [b] int64 (`len(classes)`: no class)."""
        b, patch, side = len(pixels), self.config.patch_size, self.side
        angle = time.float().unsqueeze(1) * self.frequencies
        wave = torch.cat([angle.sin(), angle.cos()], dim=1).to(pixels.dtype)
        condition = self.time_out(functional.silu(self.time_in(wave))) + self.label(label)
        condition = functional.silu(condition)
        tokens = pixels.view(b, -1, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5).reshape(b, side * side, -1)
        hidden = self.patch_in(tokens) + self.position
        for block in self.blocks:
            hidden = block(hidden, condition)
        scale, shift = self.modulation(condition).unsqueeze(1).chunk(2, dim=-1)
        out: Tensor = self.patch_out(torch.addcmul(shift, self.norm(hidden), scale + 1))
        return out.view(b, side, side, -1, patch, patch).permute(0, 3, 1, 4, 2, 5).reshape(pixels.shape)


class DitFamily(Family):
    """Latents are pixels [C, H, W] in [-1, 1]; conditions {"label": [] int64}."""

    pipelines: ClassVar[tuple[str, ...]] = (PIPELINE,)
    config: DitConfig
    shift: float

    def prepare(self) -> None:
        self.config = read_config(self.folder / self.network_folder)
        file = self.folder / "scheduler" / "scheduler_config.json"
        shift = read_json(file).get("shift")
        if isinstance(shift, bool) or not isinstance(shift, int | float) or not 0 < shift < math.inf:
            raise ModelError(f"{file}: shift is {shift!r}; it must be a number above 0")
        self.shift = float(shift)

    def load_network(self, dtype: torch.dtype) -> nn.Module:
        network = load_network(self.folder / self.network_folder, self.config)
        for parameter in network.parameters():  # the embedding's frequencies stay fp32
            parameter.data = parameter.data.to(dtype)
        return network

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(network, ClassConditionalDiT)
        return list(network.blocks)

    def save_config(self, directory: Path) -> None:
        write_config(directory, self.config)

    def latent_shape(self, sampling: FlowSampling) -> tuple[int, ...]:
        one_frame(sampling, PIPELINE)
        size = self.config.sample_size
        for field, value in (("height", sampling.height), ("width", sampling.width)):
            if value != size:
                raise RecipeError(
                    f"sampling.{field} = {value}: {self.folder} makes {size} x {size} pixels; set it to {size}"
                )
        return self.config.channels, size, size

    def schedule(self, sampling: FlowSampling) -> Tensor:
        sigmas = torch.linspace(1, 0, sampling.steps + 1, dtype=torch.float64)
        return (self.shift * sigmas / (1 + (self.shift - 1) * sigmas)).float()

    def velocity(
        self, network: Any, latents: Tensor, time: Tensor, conditions: Conditions, sampling: FlowSampling
    ) -> Tensor:
        velocity: Tensor = network(latents.to(self.dtype), time, conditions["label"])
        return velocity.float()

    def load_encoders(self) -> nn.Module:
        return nn.Module()

    def encode(self, encoders: nn.Module, texts: Sequence[str]) -> list[Conditions]:
        return [{"label": torch.tensor(self._label(text))} for text in texts]

    def _label(self, text: str) -> int:
        """The class whose word is in the text; the index after the last class for an empty text."""
        classes = self.config.classes
        if not text.strip():
            return len(classes)
        named = sorted(set(re.findall(r"\w+", text)) & set(classes))
        if len(named) == 1:
            return classes.index(named[0])
        found = f"names {len(named)} classes ({', '.join(named)})" if named else "names no class"
        raise DataError(f"the text {text!r} {found}; it must hold exactly one of: {', '.join(classes)}")

    def load_decoder(self) -> nn.Module:
        return nn.Module()

    def decode(self, decoder: nn.Module, latents: Tensor, sampling: FlowSampling) -> Any:
        return to_pixels(latents.expand(-1, 3, -1, -1))


# ----------------------------------------------------------------------------------------------------------- the folder


def write_folder(folder: Path, network: ClassConditionalDiT, *, shift: float) -> None:
    """Write a folder that `DitFamily` reads, fp32 weights, into an empty or absent directory."""
    transformer, scheduler = folder / "transformer", folder / "scheduler"
    transformer.mkdir(parents=True)
    scheduler.mkdir()
    write_config(transformer, network.config)
    weights = {name: tensor.detach().float().cpu().contiguous() for name, tensor in network.state_dict().items()}
    save_file(weights, transformer / WEIGHTS, metadata={"format": "pt"})
    _write_json(scheduler / "scheduler_config.json", {"shift": shift})
    _write_json(folder / INDEX, {"_class_name": PIPELINE})


def write_config(directory: Path, config: DitConfig) -> None:
    """`config.json` into a directory."""
    _write_json(directory / "config.json", {"_class_name": "ClassConditionalDiT", **config.model_dump()})


def read_config(directory: Path) -> DitConfig:
    """`config.json` of a directory. Raises ModelError naming the file and the field."""
    file = directory / "config.json"
    fields = {key: value for key, value in read_json(file).items() if not key.startswith("_")}
    try:
        return DitConfig.model_validate(fields)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'config'}: {e['msg']}" for e in error.errors())
        raise ModelError(f"{file}: {problems}") from error


def load_network(directory: Path, config: DitConfig) -> ClassConditionalDiT:
    """The network with the directory's weights, on the CPU, in evaluation mode. Raises ModelError unless names and
    shapes are exactly those of the configuration."""
    file = directory / WEIGHTS
    try:
        weights = load_file(file)
    except FileNotFoundError as error:
        raise ModelError(f"{file}: no such file. The folder of a ClassConditionalDiT has its weights there") from error
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: cannot be read as safetensors: {error}. Make or copy the folder again") from error
    network = ClassConditionalDiT(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    check_weights(file, wanted, weights)
    network.load_state_dict(weights)
    return network.eval()


def check_weights(file: Path, wanted: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor]) -> None:
    """Raises ModelError naming what is missing, unexpected, of another shape or not finite."""
    problems = [f"{name} is missing" for name in wanted if name not in weights]
    problems += [f"{name} is unexpected" for name in weights if name not in wanted]
    for name in wanted.keys() & weights.keys():
        shape = tuple(weights[name].shape)
        if shape != wanted[name]:
            problems.append(f"{name} has shape {list(shape)}, expected {list(wanted[name])}")
        elif not bool(weights[name].isfinite().all()):
            problems.append(f"{name} has values that are not finite")
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise ModelError(f"{file} does not fit {file.parent / 'config.json'}: {'; '.join(sorted(problems)[:5])}{more}")


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
