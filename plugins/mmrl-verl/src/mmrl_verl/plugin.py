"""What this distribution declares to mmrl. Imported whenever plugins are listed, so it imports nothing heavy."""

from __future__ import annotations

from mmrl_core import Component, Diagnosis, hookimpl

mmrl_api = 1


@hookimpl
def mmrl_training_backends() -> list[Component]:
    """verl's engines, as dotted strings that are imported only when a recipe names one."""
    return [
        Component(
            name="verl-fsdp2",
            summary="verl's FSDP2 engine, for text",
            target="mmrl_verl.backend:VerlFsdp2Backend",
            options="mmrl_verl.options:VerlFsdp2Options",
            probe="mmrl_verl.probe:verl",
        ),
        Component(
            name="verl-megatron",
            summary="verl's Megatron engine, for text, on CUDA",
            target="mmrl_verl.megatron_backend:VerlMegatronBackend",
            options="mmrl_verl.megatron_options:VerlMegatronOptions",
            probe="mmrl_verl.megatron_probe:megatron",
        ),
        Component(
            name="verl-mindspeed",
            summary="verl's MindSpeed engine (Megatron on Ascend), for text",
            target="mmrl_verl.megatron_backend:VerlMindSpeedBackend",
            options="mmrl_verl.megatron_options:VerlMegatronOptions",
            probe="mmrl_verl.megatron_probe:mindspeed",
        ),
    ]


@hookimpl
def mmrl_rewards() -> list[Component]:
    """verl's reward functions."""
    return [
        Component(
            name="verl",
            summary="verl's reward functions by data_source, or a compute_score of your own",
            target="mmrl_verl.scoring:VerlReward",
            options="mmrl_verl.options:VerlRewardOptions",
            probe="mmrl_verl.probe:verl",
        )
    ]


@hookimpl
def mmrl_advantage_estimators() -> list[Component]:
    """verl's advantage estimators."""
    return [
        Component(
            name="verl",
            summary="An advantage estimator of verl's registry",
            target="mmrl_verl.estimators:VerlEstimator",
            options="mmrl_verl.algorithm_options:VerlEstimatorOptions",
            probe="mmrl_verl.probe:verl",
        )
    ]


@hookimpl
def mmrl_policy_losses() -> list[Component]:
    """verl's policy losses."""
    return [
        Component(
            name="verl",
            summary="A policy loss of verl's registry",
            target="mmrl_verl.policy_losses:VerlPolicyGradient",
            options="mmrl_verl.algorithm_options:VerlLossOptions",
            probe="mmrl_verl.probe:verl",
        )
    ]


@hookimpl
def mmrl_diagnoses() -> list[Diagnosis]:
    """Which verl is installed."""
    return [Diagnosis(name="verl", probe="mmrl_verl.probe:verl")]
