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
    ]


# -------------------------------------------------------------------------------------------------- rewards and prompts


@hookimpl
def mmrl_rewards() -> Sequence[Component]:
    """Rewards for text."""
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
