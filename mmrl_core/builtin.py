"""mmrl's own components, declared through the same hooks as anybody's. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from mmrl_core.devices.declared import DEVICES
from mmrl_core.hookspecs import Component, hookimpl

mmrl_api = 1


# -------------------------------------------------------------------------------------------------------------- devices


@hookimpl
def mmrl_device_ops() -> Sequence[Component]:
    """See `mmrl_core/devices/declared.py`."""
    return DEVICES


# ------------------------------------------------------------------------------------------------------------ launchers


@hookimpl
def mmrl_launchers() -> Sequence[Component]:
    """local and torchrun."""
    return [
        Component(
            name="local",
            summary="Ranks on this machine, started and watched by mmrl",
            target="mmrl_core.launch.local:LocalLauncher",
            options="mmrl_core.launch.options:LocalOptions",
        ),
        Component(
            name="torchrun",
            summary="Ranks that torchrun has started already",
            target="mmrl_core.launch.torchrun:TorchrunLauncher",
            options="mmrl_core.launch.options:TorchrunOptions",
        ),
    ]


# ------------------------------------------------------------------------------------- policies, backends, rollouts


@hookimpl
def mmrl_policies() -> Sequence[Component]:
    """Model families."""
    return [
        Component(
            name="causal_lm",
            summary="Text models of transformers; an action is a token",
            target="mmrl_core.policies.causal_lm:CausalLmPolicy",
            options="mmrl_core.policies.options:CausalLmOptions",
            sampling="mmrl_core.policies.options:TokenSampling",
        ),
        Component(
            name="flow",
            summary="Image and video models trained by flow matching (FLUX.1, SD3, Wan); an action is a denoising step",
            target="mmrl_core.policies.flow.policy:FlowPolicy",
            options="mmrl_core.policies.flow.options:FlowOptions",
            sampling="mmrl_core.policies.flow.options:FlowSampling",
        ),
    ]


@hookimpl
def mmrl_training_backends() -> Sequence[Component]:
    """Training backends."""
    return [
        Component(
            name="fsdp2",
            summary="PyTorch fully_shard on 1 to N ranks",
            target="mmrl_core.backends.fsdp2:Fsdp2Backend",
            options="mmrl_core.backends.options:Fsdp2Options",
        ),
    ]


@hookimpl
def mmrl_rollout_engines() -> Sequence[Component]:
    """Rollout engines."""
    return [
        Component(
            name="hf",
            summary="Generation with the transformers model, sharing the training weights or with its own",
            target="mmrl_core.rollouts.hf:HfEngine",
            options="mmrl_core.rollouts.options:HfOptions",
        ),
        Component(
            name="flow",
            summary="Denoising with the policy's network, sharing the training weights or with its own",
            target="mmrl_core.rollouts.flow:FlowEngine",
            options="mmrl_core.rollouts.options:FlowEngineOptions",
        ),
    ]


# -------------------------------------------------------------------------------------------------- rewards and prompts


@hookimpl
def mmrl_rewards() -> Sequence[Component]:
    """Rewards for text, and for images and videos."""
    return [
        Component(
            name="math",
            summary="The boxed answer, compared as mathematics (math-verify)",
            target="mmrl_core.rewards.math:MathReward",
            options="mmrl_core.rewards.options:MathOptions",
        ),
        Component(
            name="numeric",
            summary="The last number in the text equals the reference",
            target="mmrl_core.rewards.rule:numeric",
            options="mmrl_core.rewards.options:NumericOptions",
        ),
        Component(
            name="exact",
            summary="The text equals the reference",
            target="mmrl_core.rewards.rule:exact",
            options="mmrl_core.rewards.options:ExactOptions",
        ),
        Component(
            name="format",
            summary="The text matches a pattern",
            target="mmrl_core.rewards.rule:Format",
            options="mmrl_core.rewards.options:FormatOptions",
        ),
        Component(
            name="length",
            summary="The response's length is in a band, or not overlong",
            target="mmrl_core.rewards.rule:length",
            options="mmrl_core.rewards.options:LengthOptions",
        ),
        Component(
            name="reasoning_gym",
            summary="The verifier of the reasoning-gym task that made the prompt",
            target="mmrl_core.rewards.reasoning_gym_reward:ReasoningGymReward",
            options="mmrl_core.rewards.options:ReasoningGymRewardOptions",
            probe="mmrl_core.data.probes:reasoning_gym",
        ),
        Component(
            name="jpeg_compressibility",
            summary="How small, or how large, the image is as a JPEG file",
            target="mmrl_core.rewards.image:jpeg_compressibility",
            options="mmrl_core.rewards.options:JpegCompressibilityOptions",
        ),
        Component(
            name="brightness",
            summary="Mean luma of the image",
            target="mmrl_core.rewards.image:brightness",
            options="mmrl_core.rewards.options:BrightnessOptions",
        ),
        Component(
            name="sharpness",
            summary="Variance of the Laplacian of the image's luma",
            target="mmrl_core.rewards.image:sharpness",
            options="mmrl_core.rewards.options:SharpnessOptions",
        ),
        Component(
            name="digits",
            summary="How surely a small classifier sees the prompted digit in an 8 x 8 image",
            target="mmrl_core.rewards.digits:DigitsReward",
            options="mmrl_core.rewards.options:DigitsRewardOptions",
            probe="mmrl_core.digits.probes:scikit_learn",
        ),
        Component(
            name="digits_judge",
            summary="Whether a second, independent classifier sees the prompted digit",
            target="mmrl_core.rewards.digits:DigitsJudge",
            options="mmrl_core.rewards.options:DigitsJudgeOptions",
            probe="mmrl_core.digits.probes:scikit_learn",
        ),
        Component(
            name="remote",
            summary="A reward that `mmrl serve-reward` runs elsewhere",
            target="mmrl_core.rewards.remote:RemoteReward",
            options="mmrl_core.rewards.options:RemoteOptions",
        ),
    ]


@hookimpl
def mmrl_prompt_sources() -> Sequence[Component]:
    """Where prompts come from."""
    return [
        Component(
            name="arithmetic",
            summary="Procedural sums, differences and products",
            target="mmrl_core.data.arithmetic:ArithmeticSource",
            options="mmrl_core.data.options:ArithmeticOptions",
        ),
        Component(
            name="digits",
            summary="The ten digits by name, for models that draw them",
            target="mmrl_core.data.digits:DigitsSource",
            options="mmrl_core.data.options:DigitsOptions",
        ),
        Component(
            name="embedded_captions",
            summary="Prompts with text embeddings computed before, for images and video",
            target="mmrl_core.data.captions:EmbeddedCaptionsSource",
            options="mmrl_core.data.options:EmbeddedCaptionsOptions",
        ),
        Component(
            name="jsonl",
            summary="JSONL files, or a JSON array",
            target="mmrl_core.data.tables:JsonlSource",
            options="mmrl_core.data.options:TableOptions",
        ),
        Component(
            name="parquet",
            summary="Parquet files",
            target="mmrl_core.data.tables:ParquetSource",
            options="mmrl_core.data.options:TableOptions",
        ),
        Component(
            name="reasoning_gym",
            summary="Procedural reasoning tasks of reasoning-gym",
            target="mmrl_core.data.reasoning_gym_source:ReasoningGymSource",
            options="mmrl_core.data.options:ReasoningGymOptions",
            probe="mmrl_core.data.probes:reasoning_gym",
        ),
    ]


# -------------------------------------------------------------------------------------------------------------- writers


@hookimpl
def mmrl_writers() -> Sequence[Component]:
    """Where metrics go."""
    return [
        Component(
            name="console",
            summary="Live progress on the terminal",
            target="mmrl_core.metrics.console:ConsoleWriter",
            options="mmrl_core.metrics.options:ConsoleOptions",
        ),
        Component(
            name="jsonl",
            summary="One JSON object a step",
            target="mmrl_core.metrics.jsonl:JsonlWriter",
            options="mmrl_core.metrics.options:JsonlOptions",
        ),
        Component(
            name="images",
            summary="Contact sheets of images and videos, before, during and after training",
            target="mmrl_core.metrics.images:ImagesWriter",
            options="mmrl_core.metrics.options:ImagesOptions",
        ),
        Component(
            name="reward_history",
            summary="The mean reward of every step, one number a line",
            target="mmrl_core.metrics.reward_history:RewardHistoryWriter",
            options="mmrl_core.metrics.options:RewardHistoryOptions",
        ),
        Component(
            name="tensorboard",
            summary="TensorBoard event files",
            target="mmrl_core.metrics.tensorboard:TensorboardWriter",
            options="mmrl_core.metrics.options:TensorboardOptions",
        ),
        Component(
            name="wandb",
            summary="Weights & Biases",
            target="mmrl_core.metrics.wandb:WandbWriter",
            options="mmrl_core.metrics.options:WandbOptions",
            probe="mmrl_core.metrics.probes:wandb",
        ),
    ]


# ------------------------------------------------------------------------------------------------------- weight formats


@hookimpl
def mmrl_weight_formats() -> Sequence[Component]:
    """What weights are read from and converted to."""
    return [
        Component(
            name="hf",
            summary="Hugging Face folders: safetensors with the config of transformers or of a diffusers network",
            target="mmrl_core.checkpoint.hf_format:HuggingFaceFormat",
            options="mmrl_core.checkpoint.format_options:HuggingFaceOptions",
        ),
        Component(
            name="dcp",
            summary="Folders of torch.distributed.checkpoint",
            target="mmrl_core.checkpoint.dcp_format:DcpFormat",
        ),
    ]
