"""Stable Diffusion 3 and 3.5: images; two CLIP text encoders, and T5 where the folder has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from mmrl_core.contracts import Bucket
from mmrl_core.errors import ModelError, RecipeError
from mmrl_core.policies.flow.family import Conditions
from mmrl_core.policies.flow.folder_schedule import TIME_SCALE, folder_sigmas, resolution_shift
from mmrl_core.policies.flow.latent_sizes import one_frame, pixel_grid
from mmrl_core.policies.flow.pipeline_family import PipelineFamily
from mmrl_core.policies.flow.pixels import to_pixels
from mmrl_core.policies.flow.text_encoders import CLIP_TOKENIZERS, T5_TOKENIZERS, EncoderClasses, TextEncoders

if TYPE_CHECKING:
    from mmrl_core.policies.flow.options import FlowSampling

TEXT_TOKENS, MOST_TEXT_TOKENS = 256, 512

POSITIONS = "pos_embed.pos_embed"
"""The table of positions: stored with the weights, but no parameter."""


class Sd3Family(PipelineFamily):
    """Latents are [C, h, w].

    Conditions: `prompt_embeds` [77 + L, D], the two CLIP encoders side by side and then T5 (zeros without one);
    `pooled_prompt_embeds` [P] of both CLIP encoders.
    """

    pipelines = ("StableDiffusion3Pipeline",)
    network_class = "SD3Transformer2DModel"
    vae_class = "AutoencoderKL"
    encoder_classes: ClassVar[Mapping[str, EncoderClasses]] = {
        "text_encoder": ("CLIPTextModelWithProjection", CLIP_TOKENIZERS),
        "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_TOKENIZERS),
        "text_encoder_3": ("T5EncoderModel", T5_TOKENIZERS),
    }

    def _prepare(self) -> None:
        config = self.network_config
        self._channels, self._patch = config["in_channels"], config["patch_size"]
        if not self._channels == config["out_channels"] == self.vae_config["latent_channels"]:
            raise ModelError(
                f"{self.folder / self.network_folder}: from {self._channels} to {config['out_channels']} channels is "
                f"no denoiser of the VAE's {self.vae_config['latent_channels']} channels"
            )
        self.widths = {
            "prompt_embeds": config["joint_attention_dim"],
            "pooled_prompt_embeds": config["pooled_projection_dim"],
        }
        self._scale, self._shift = self._latent_scale()
        self._cell = self._patch * 2 ** (len(self.vae_config["block_out_channels"]) - 1)
        self._text_tokens = self.options.max_text_tokens or TEXT_TOKENS
        if self._text_tokens > MOST_TEXT_TOKENS:
            raise RecipeError(
                f"model.policy.max_text_tokens = {self._text_tokens}: SD3 takes at most {MOST_TEXT_TOKENS}"
            )

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        parts: Any = network
        return list(parts.transformer_blocks)

    def fixed_weights(self) -> Bucket:
        return [(POSITIONS, self.pipeline.stored(self.network_folder, POSITIONS))]

    def latent_shape(self, sampling: FlowSampling) -> tuple[int, ...]:
        one_frame(sampling, "SD3")
        height, width = pixel_grid(sampling, self._cell, "SD3", most=self.network_config["pos_embed_max_size"])
        return self._channels, height * self._patch, width * self._patch

    def schedule(self, sampling: FlowSampling) -> Tensor:
        scheduler = self.pipeline.scheduler()
        _, height, width = self.latent_shape(sampling)
        settings: dict[str, Any] = {"num_inference_steps": sampling.steps}
        if scheduler.config.get("use_dynamic_shifting"):
            tokens = (height // self._patch) * (width // self._patch)
            settings["mu"] = resolution_shift(scheduler.config, tokens, max_shift=1.16)
        return folder_sigmas(scheduler, sampling.steps, self.folder, **settings)

    def velocity(
        self, network: Any, latents: Tensor, time: Tensor, conditions: Conditions, sampling: FlowSampling
    ) -> Tensor:
        velocity: Tensor = network(
            hidden_states=latents.to(self.dtype),
            timestep=time * TIME_SCALE,
            encoder_hidden_states=self._take(conditions, "prompt_embeds", latents),
            pooled_projections=self._take(conditions, "pooled_prompt_embeds", latents),
            return_dict=False,
        )[0]
        return velocity.float()

    def _has_encoder(self, name: str) -> bool:
        return name != "text_encoder_3" or self.pipeline.has(name)

    def _encode(self, encoders: TextEncoders, texts: Sequence[str]) -> Conditions:
        # both encoders' texts have the length that the first one's tokenizer states
        length = encoders.tokenizers["text_encoder"].model_max_length
        outputs = [
            encoders.models[name](encoders.tokens(name, texts, length)[0], output_hidden_states=True)
            for name in ("text_encoder", "text_encoder_2")
        ]
        clip = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        width = self.widths["prompt_embeds"]
        if "text_encoder_3" in encoders.models:
            encoders.note_cuts("text_encoder_3", texts, self._text_tokens)
            pieces, _ = encoders.tokens("text_encoder_3", texts, self._text_tokens)
            t5 = encoders.models["text_encoder_3"](pieces)[0]  # no mask: padding is attended to
        else:
            t5 = clip.new_zeros(len(texts), self._text_tokens, width)
        return {
            "prompt_embeds": torch.cat([nn.functional.pad(clip, (0, width - clip.shape[-1])), t5], dim=1),
            "pooled_prompt_embeds": torch.cat([output.text_embeds for output in outputs], dim=-1),
        }

    @torch.no_grad()
    def decode(self, decoder: nn.Module, latents: Tensor, sampling: FlowSampling) -> Any:
        return to_pixels(self._decoded(decoder, latents.float() / self._scale + self._shift))
