"""What model families that diffusers has a pipeline for have in common."""

from __future__ import annotations

import shutil
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmrl_core.errors import DataError, ModelError
from mmrl_core.policies.flow.diffusers_folder import DiffusersFolder
from mmrl_core.policies.flow.family import Conditions, Family
from mmrl_core.policies.flow.text_encoders import EncoderClasses, TextEncoders


class PipelineFamily(Family):
    """A family whose network and VAE are diffusers' and whose text encoders are transformers'."""

    network_class: ClassVar[str]
    """Of the component `transformer`."""
    vae_class: ClassVar[str]
    """Of the component `vae`."""
    encoder_classes: ClassVar[Mapping[str, EncoderClasses]]
    """Of each text encoder."""
    widths: Mapping[str, int]
    """Length of the last dimension of each condition, after `prepare`."""

    def prepare(self) -> None:
        self.pipeline = DiffusersFolder(self.folder)
        self.network_config = self.pipeline.config(self.network_folder, self.network_class)
        self.vae_config = self.pipeline.config("vae", self.vae_class)
        self._prepare()

    @abstractmethod
    def _prepare(self) -> None:
        """Check the configurations, and set `widths`. Raises ModelError and RecipeError."""

    def _latent_scale(self) -> tuple[float, float]:
        """Factor and shift of an AutoencoderKL's latents: (z - shift) factor is what the network sees."""
        factor, shift = self.vae_config["scaling_factor"], self.vae_config["shift_factor"]
        if factor is None or shift is None:
            raise ModelError(f"{self.folder / 'vae' / 'config.json'}: scaling_factor or shift_factor is missing")
        return factor, shift

    def load_network(self, dtype: torch.dtype) -> nn.Module:
        return self.pipeline.model(self.network_folder, dtype, self.network_class)

    def save_config(self, directory: Path) -> None:
        shutil.copyfile(self.folder / self.network_folder / "config.json", directory / "config.json")

    def load_decoder(self) -> nn.Module:
        return self.pipeline.model("vae", getattr(torch, self.options.vae_dtype), self.vae_class)

    def load_encoders(self) -> nn.Module:
        present = {name: kind for name, kind in self.encoder_classes.items() if self._has_encoder(name)}
        dtype = getattr(torch, self.options.encoder_dtype) if self.options.encoder_dtype else self.dtype
        return TextEncoders(self.pipeline, dtype, present)

    def _has_encoder(self, name: str) -> bool:
        """False for an encoder that the pipeline can do without and does."""
        return True

    @torch.no_grad()
    def encode(self, encoders: nn.Module, texts: Sequence[str]) -> list[Conditions]:
        assert isinstance(encoders, TextEncoders)
        if not texts:
            return []
        batch = {name: value.cpu() for name, value in self._encode(encoders, texts).items()}
        # a row has memory of its own: a view would keep the whole batch alive
        return [{name: value[row].clone() for name, value in batch.items()} for row in range(len(texts))]

    @abstractmethod
    def _encode(self, encoders: TextEncoders, texts: Sequence[str]) -> Conditions:
        """[b, ...] each, as the pipeline's `encode_prompt`."""

    def _take(self, conditions: Conditions, name: str, like: Tensor) -> Tensor:
        """The condition [b, ..., width] beside `like`, in the network's precision. Raises DataError: embeddings made
        elsewhere may be another model's."""
        value, width = conditions.get(name), self.widths[name]
        if value is None:
            raise DataError(f"the prompt's embeddings lack {name!r} and have {sorted(conditions)}: another model's?")
        if value.shape[-1] != width:
            raise DataError(
                f"the prompt's embedding {name!r} is {value.shape[-1]} wide; the model in {self.folder} takes {width}: "
                "it was made for another model"
            )
        return value.to(like.device, self.dtype)

    def _decoded(self, decoder: Any, latents: Tensor) -> Tensor:
        """[b, 3, ..., H, W] of latents as the VAE was trained on them (no scale, no shift)."""
        parameter = next(decoder.parameters())
        decoded: Tensor = decoder.decode(latents.to(parameter.device, parameter.dtype), return_dict=False)[0]
        return decoded
