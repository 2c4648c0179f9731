"""Tiny random pipelines for images and video, in exactly the folder layout of the published ones. Needs no network."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

from mmrl_core.testing.tiny_tokenizers import clip_tokenizer, t5_tokenizer

TinyFamily = Literal["flux", "sd3", "wan21", "wan22"]

TEXT_WIDTH = 32
"""Width of T5 and UMT5 states."""


def tiny_pipeline(
    folder: Path, family: TinyFamily, seed: int = 0, *, scheduler: Literal["published", "euler"] = "published"
) -> Path:
    """Write a diffusers folder of a random fp32 pipeline with under a million parameters; returned.

    The configurations have the fields and the structure of FLUX.1-dev, Stable Diffusion 3.5, Wan2.1-T2V and
    Wan2.2-TI2V-5B, with the same ratios of pixels to latents, so that what fits them fits here: multiples of 16 pixels
    (32 for wan22), 1 + 4 k frames. Weights (biases and norms included) are drawn wide enough that prompt, pooled
    prompt, guidance and time all show in the velocity.

    Args:
        scheduler: `published`: of the kind that the real folder has, which for Wan is UniPC and for FLUX shifts with
            the resolution. `euler`: FlowMatchEulerDiscreteScheduler with a fixed shift.
    """
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    parts = {"flux": _flux, "sd3": _sd3, "wan21": _wan21, "wan22": _wan22}[family]
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        components, facts = parts()
        for component in components.values():
            if isinstance(component, torch.nn.Module):
                _draw(component)
    finally:
        torch.set_rng_state(state)
    if scheduler == "euler":
        components["scheduler"] = _euler(shift=3.0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, component in components.items():
        component.save_pretrained(folder / name)
    index = {**facts, **{name: [_library(part), type(part).__name__] for name, part in components.items()}}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return folder


def _library(component: Any) -> str:
    return type(component).__module__.partition(".")[0]


def _draw(model: Any) -> None:
    """Redraw every parameter: matrices so that what comes out is about as large as what goes in."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim == 1 or name.endswith(("gamma", "scale_shift_table")):
                if name.endswith((".bias", "scale_shift_table")):
                    parameter.copy_(0.2 * noise)
                else:  # of a norm
                    parameter.copy_(1 + 0.2 * noise)
            elif "embed" in name and parameter.ndim == 2 and "linear" not in name and "proj" not in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise / math.sqrt(math.prod(parameter.shape[1:])))


# -------------------------------------------------------------------------------------------------------------- images


def _flux() -> tuple[dict[str, Any], dict[str, Any]]:
    from diffusers import FluxTransformer2DModel

    network = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=24,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    components = {
        "scheduler": _euler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        "text_encoder": _clip(24, projection=False),
        "text_encoder_2": _t5("t5"),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": t5_tokenizer(),
        "transformer": network,
        "vae": _image_vae(scaling_factor=0.3611, shift_factor=0.1159),
    }
    return components, {"_class_name": "FluxPipeline", "_diffusers_version": "0.36.0"}


def _sd3() -> tuple[dict[str, Any], dict[str, Any]]:
    from diffusers import SD3Transformer2DModel

    network = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=28,
        pos_embed_max_size=24,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    components = {
        "scheduler": _euler(shift=3.0),
        "text_encoder": _clip(12, projection=True),
        "text_encoder_2": _clip(16, projection=True),
        "text_encoder_3": _t5("t5"),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(pad_token="!"),
        "tokenizer_3": t5_tokenizer(),
        "transformer": network,
        "vae": _image_vae(scaling_factor=1.5305, shift_factor=0.0609),
    }
    absent = {"feature_extractor": [None, None], "image_encoder": [None, None]}
    return components, {"_class_name": "StableDiffusion3Pipeline", "_diffusers_version": "0.36.0", **absent}


def _image_vae(*, scaling_factor: float, shift_factor: float) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        sample_size=64,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=True,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
    )


# --------------------------------------------------------------------------------------------------------------- video


def _wan21() -> tuple[dict[str, Any], dict[str, Any]]:
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return _wan(16, vae, flow_shift=3.0), {"_class_name": "WanPipeline", "_diffusers_version": "0.36.0"}


def _wan22() -> tuple[dict[str, Any], dict[str, Any]]:
    import torch
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=8,
        z_dim=48,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        dropout=0.0,
        latents_mean=[round(float(x), 4) for x in 0.2 * torch.randn(48)],
        latents_std=[round(float(x), 4) for x in 0.4 + 0.6 * torch.rand(48)],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=16,
    )
    facts = {"expand_timesteps": True, "boundary_ratio": None, "transformer_2": [None, None]}
    index = {"_class_name": "WanPipeline", "_diffusers_version": "0.36.0", **facts}
    return _wan(48, vae, flow_shift=5.0), index


def _wan(channels: int, vae: Any, *, flow_shift: float) -> dict[str, Any]:
    from diffusers import UniPCMultistepScheduler, WanTransformer3DModel

    network = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=channels,
        out_channels=channels,
        text_dim=TEXT_WIDTH,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )
    return {
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift
        ),
        "text_encoder": _t5("umt5"),
        "tokenizer": t5_tokenizer(),
        "transformer": network,
        "vae": vae,
    }


# -------------------------------------------------------------------------------------------------------- shared parts


def _euler(**settings: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**settings)


def _clip(width: int, *, projection: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def _t5(kind: Literal["t5", "umt5"]) -> Any:
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    size = {
        "vocab_size": len(t5_tokenizer()),
        "d_model": TEXT_WIDTH,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
    }
    return T5EncoderModel(T5Config(**size)) if kind == "t5" else UMT5EncoderModel(UMT5Config(**size))
