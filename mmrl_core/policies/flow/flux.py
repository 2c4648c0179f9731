"""FLUX.1: images, guidance-distilled or not; CLIP and T5 text encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from mmrl_core.errors import ModelError, RecipeError
from mmrl_core.policies.flow.family import Conditions
from mmrl_core.policies.flow.folder_schedule import folder_sigmas, resolution_shift
from mmrl_core.policies.flow.latent_sizes import one_frame, pixel_grid
from mmrl_core.policies.flow.pipeline_family import PipelineFamily
from mmrl_core.policies.flow.pixels import to_pixels
from mmrl_core.policies.flow.text_encoders import CLIP_TOKENIZERS, T5_TOKENIZERS, EncoderClasses, TextEncoders

if TYPE_CHECKING:
    from mmrl_core.policies.flow.options import FlowSampling

PACK = 2
"""A square of PACK x PACK latent pixels is one token."""

MOST_TEXT_TOKENS = 512


class FluxFamily(PipelineFamily):
    """FLUX.1-dev and -schnell. Latents are packed tokens [n, C PACK^2], in reading order.

    Conditions: `prompt_embeds` [L, D] of T5, `pooled_prompt_embeds` [P] of CLIP. Positions are computed here.
    """

    pipelines = ("FluxPipeline",)
    network_class = "FluxTransformer2DModel"
    vae_class = "AutoencoderKL"
    encoder_classes: ClassVar[Mapping[str, EncoderClasses]] = {
        "text_encoder": ("CLIPTextModel", CLIP_TOKENIZERS),
        "text_encoder_2": ("T5EncoderModel", T5_TOKENIZERS),
    }

    def _prepare(self) -> None:
        config, latent_channels = self.network_config, self.vae_config["latent_channels"]
        self._channels: int = config["in_channels"]
        if self._channels != latent_channels * PACK**2 or config["out_channels"] not in (None, self._channels):
            raise ModelError(
                f"{self.folder / self.network_folder}: from {self._channels} to "
                f"{config['out_channels'] or self._channels} channels is no denoiser of the VAE's {latent_channels} "
                "channels, packed by 4; FLUX models that see another image beside the prompt are not supported"
            )
        self.widths = {
            "prompt_embeds": config["joint_attention_dim"],
            "pooled_prompt_embeds": config["pooled_projection_dim"],
        }
        self._scale, self._shift = self._latent_scale()
        self._cell = PACK * 2 ** (len(self.vae_config["block_out_channels"]) - 1)
        self._text_tokens = self.options.max_text_tokens or MOST_TEXT_TOKENS
        if self._text_tokens > MOST_TEXT_TOKENS:
            raise RecipeError(
                f"model.policy.max_text_tokens = {self._text_tokens}: FLUX takes at most {MOST_TEXT_TOKENS}"
            )
        self._positions: dict[tuple[int, int, torch.device], Tensor] = {}

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        parts: Any = network
        return [*parts.transformer_blocks, *parts.single_transformer_blocks]

    def latent_shape(self, sampling: FlowSampling) -> tuple[int, ...]:
        one_frame(sampling, "FLUX")
        height, width = pixel_grid(sampling, self._cell, "FLUX")
        return height * width, self._channels

    def schedule(self, sampling: FlowSampling) -> Tensor:
        scheduler = self.pipeline.scheduler()
        tokens, _ = self.latent_shape(sampling)
        settings: dict[str, Any] = {"mu": resolution_shift(scheduler.config, tokens, max_shift=1.15)}
        if scheduler.config.get("use_flow_sigmas"):
            settings["num_inference_steps"] = sampling.steps
        else:
            settings["sigmas"] = np.linspace(1.0, 1 / sampling.steps, sampling.steps)
        return folder_sigmas(scheduler, sampling.steps, self.folder, **settings)

    def velocity(
        self, network: Any, latents: Tensor, time: Tensor, conditions: Conditions, sampling: FlowSampling
    ) -> Tensor:
        prompt = self._take(conditions, "prompt_embeds", latents)
        height, width = self._grid(sampling)
        velocity: Tensor = network(
            hidden_states=latents.to(self.dtype),
            timestep=time,
            guidance=torch.full_like(time, sampling.guidance_scale) if self.network_config["guidance_embeds"] else None,
            pooled_projections=self._take(conditions, "pooled_prompt_embeds", latents),
            encoder_hidden_states=prompt,
            txt_ids=self._text_positions(prompt.shape[1], latents.device),
            img_ids=self._image_positions(height, width, latents.device),
            return_dict=False,
        )[0]
        return velocity.float()

    def _grid(self, sampling: FlowSampling) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return sampling.height // self._cell, sampling.width // self._cell

    def _text_positions(self, length: int, device: torch.device) -> Tensor:
        """[length, 3] zeros: to FLUX, text has no place."""
        key = length, 0, device
        if key not in self._positions:
            self._positions[key] = torch.zeros(length, 3, device=device)
        return self._positions[key]

    def _image_positions(self, height: int, width: int, device: torch.device) -> Tensor:
        """[height width, 3]: 0, row, column."""
        key = height, width, device
        if key not in self._positions:
            rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1)
            self._positions[key] = places.flatten(0, 1).float().to(device)
        return self._positions[key]

    def _encode(self, encoders: TextEncoders, texts: Sequence[str]) -> Conditions:
        clip, t5 = encoders.models["text_encoder"], encoders.models["text_encoder_2"]
        words, _ = encoders.tokens("text_encoder", texts, encoders.tokenizers["text_encoder"].model_max_length)
        encoders.note_cuts("text_encoder_2", texts, self._text_tokens)
        pieces, _ = encoders.tokens("text_encoder_2", texts, self._text_tokens)
        # no mask: FLUX was trained with padding attended to
        return {"prompt_embeds": t5(pieces)[0], "pooled_prompt_embeds": clip(words).pooler_output}

    @torch.no_grad()
    def decode(self, decoder: nn.Module, latents: Tensor, sampling: FlowSampling) -> Any:
        height, width = self._grid(sampling)
        squares = latents.float().view(len(latents), height, width, -1, PACK, PACK)
        unpacked = squares.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        return to_pixels(self._decoded(decoder, unpacked / self._scale + self._shift))
