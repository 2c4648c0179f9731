"""Wan2.1 text-to-video and Wan2.2-TI2V-5B: video, and images as videos of one frame; a UMT5 text encoder."""

from __future__ import annotations

import html
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from mmrl_core.errors import ModelError
from mmrl_core.policies.flow.diffusers_folder import INDEX
from mmrl_core.policies.flow.family import Conditions
from mmrl_core.policies.flow.folder_schedule import TIME_SCALE, folder_sigmas
from mmrl_core.policies.flow.latent_sizes import frame_count, pixel_grid
from mmrl_core.policies.flow.pipeline_family import PipelineFamily
from mmrl_core.policies.flow.pixels import to_pixels
from mmrl_core.policies.flow.text_encoders import T5_TOKENIZERS, EncoderClasses, TextEncoders

if TYPE_CHECKING:
    from mmrl_core.policies.flow.options import FlowSampling

log = logging.getLogger("mmrl.model")

TEXT_TOKENS = 512


class WanFamily(PipelineFamily):
    """Latents are [C, f, h, w]. Conditions: `prompt_embeds` [L, D], zeros beyond the prompt's end."""

    pipelines = ("WanPipeline",)
    network_class = "WanTransformer3DModel"
    vae_class = "AutoencoderKLWan"
    encoder_classes: ClassVar[Mapping[str, EncoderClasses]] = {"text_encoder": ("UMT5EncoderModel", T5_TOKENIZERS)}

    def _prepare(self) -> None:
        config, vae, index = self.network_config, self.vae_config, self.pipeline.index
        if self.pipeline.has("transformer_2") or index.get("boundary_ratio") is not None:
            raise ModelError(
                f"{self.folder / INDEX}: two networks that share the denoising (Wan2.2-A14B) are not supported; use "
                "Wan2.1-T2V or Wan2.2-TI2V-5B"
            )
        self._channels: int = config["in_channels"]
        if not self._channels == config["out_channels"] == vae["z_dim"] or config["image_dim"] is not None:
            raise ModelError(
                f"{self.folder / self.network_folder}: from {self._channels} to {config['out_channels']} channels is "
                f"no text-to-video denoiser of the VAE's {vae['z_dim']} channels; image-to-video models "
                "are not supported"
            )
        self.widths = {"prompt_embeds": config["text_dim"]}
        self._per_token = bool(index.get("expand_timesteps"))
        self._text_tokens = self.options.max_text_tokens or TEXT_TOKENS
        self._space, self._time = vae["scale_factor_spatial"], vae["scale_factor_temporal"]
        if config["patch_size"][0] != 1 or len(set(config["patch_size"][1:])) != 1:
            raise ModelError(
                f"{self.folder / self.network_folder}: patches of {config['patch_size']} latent frames, rows and "
                "columns; this family knows those of one frame and a square"
            )
        self._patch: int = config["patch_size"][2]

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        parts: Any = network
        return list(parts.blocks)

    def latent_shape(self, sampling: FlowSampling) -> tuple[int, ...]:
        most = self.network_config["rope_max_seq_len"]
        height, width = pixel_grid(sampling, self._space * self._patch, "Wan", most=most)
        frames = frame_count(sampling, self._time, "Wan", most=most)
        return self._channels, frames, height * self._patch, width * self._patch

    def schedule(self, sampling: FlowSampling) -> Tensor:
        return folder_sigmas(self.pipeline.scheduler(), sampling.steps, self.folder, num_inference_steps=sampling.steps)

    def velocity(
        self, network: Any, latents: Tensor, time: Tensor, conditions: Conditions, sampling: FlowSampling
    ) -> Tensor:
        # A time a token: all alike from text alone, so one that is broadcast has the values of the pipeline's row of
        # equal ones, and spares a modulation of 6 D numbers a token.
        timestep = (time * TIME_SCALE)[:, None] if self._per_token else time * TIME_SCALE
        velocity: Tensor = network(
            hidden_states=latents.to(self.dtype),
            timestep=timestep,
            encoder_hidden_states=self._take(conditions, "prompt_embeds", latents),
            return_dict=False,
        )[0]
        return velocity.float()

    def load_encoders(self) -> nn.Module:
        repaired = "repaired by" if importlib.util.find_spec("ftfy") else "left as they are, without"
        log.info("wan: characters of prompts are %s the package ftfy, as in diffusers' pipeline", repaired)
        return super().load_encoders()

    def _encode(self, encoders: TextEncoders, texts: Sequence[str]) -> Conditions:
        tidy = [tidied(text) for text in texts]
        encoders.note_cuts("text_encoder", tidy, self._text_tokens)
        pieces, mask = encoders.tokens("text_encoder", tidy, self._text_tokens)
        states = encoders.models["text_encoder"](pieces, mask).last_hidden_state
        return {"prompt_embeds": states.masked_fill(mask[..., None] == 0, 0.0)}

    @torch.no_grad()
    def decode(self, decoder: nn.Module, latents: Tensor, sampling: FlowSampling) -> Any:
        mean, std = (
            torch.tensor(self.vae_config[name], device=latents.device).view(-1, 1, 1, 1)
            for name in ("latents_mean", "latents_std")
        )
        return to_pixels(self._decoded(decoder, latents.float() * std + mean))


def tidied(text: str) -> str:
    """A prompt as Wan reads it: mangled characters repaired (when ftfy is installed), HTML entities resolved, and
    single spaces between words."""
    if importlib.util.find_spec("ftfy"):
        text = importlib.import_module("ftfy").fix_text(text)
    return " ".join(html.unescape(html.unescape(text)).split())
