"""Building verl's Megatron engine, which on Ascend is its MindSpeed engine, from what a recipe says."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmrl_core.errors import BackendError
from mmrl_verl.building import Plan, model_config, quietly
from mmrl_verl.megatron_options import VerlMegatronOptions
from mmrl_verl.megatron_probe import BRIDGE_CURES, bridge_is_here
from mmrl_verl.platforms import choose, engine_class

ADAPTOR = "mindspeed.megatron_adaptor"


def build(plan: Plan[VerlMegatronOptions], name: str) -> Any:
    """verl's engine, initialised. Collective.

    Raises BackendError, naming the backend `name`, or ModelError when the model's config cannot be read.
    """
    options = plan.options
    _check_plan(plan, name)
    device = plan.context.device.torch_device.type
    _check_import_order(device, name)
    choose(device)
    with quietly():
        base = _engine_class(name)
        arguments = configs(plan)
        _check_rotary(arguments["model_config"].hf_config, options, name)
        try:
            engine = _without_schedule(base)(**arguments)
            _check_layout(options, name)
            engine.initialize()
        except ImportError as error:
            raise BackendError(f"backend {name}: verl's engine needs a package that is missing: {error}") from error
        except (NotImplementedError, ValueError) as error:
            raise BackendError(
                f"backend {name}: {options.bridge} cannot make Megatron's model of {plan.policy.model.path!r} in this "
                f"layout: {error}"
            ) from error
    return engine


def configs(plan: Plan[VerlMegatronOptions]) -> dict[str, Any]:
    """The arguments of verl's engine: its model, engine, optimizer and checkpoint configs."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import McoreEngineConfig, McoreOptimizerConfig

    model, options, spec = plan.policy.model, plan.options, plan.training.optimizer
    contents = ["model", "optimizer"]
    return {
        # its tokenizer's padding token is asked for in every forward pass
        "model_config": model_config(plan, override_config={"attn_implementation": "sdpa"}),
        "engine_config": McoreEngineConfig(
            dtype=model.dtype,
            tensor_model_parallel_size=options.tensor_parallel,
            pipeline_model_parallel_size=options.pipeline_parallel,
            sequence_parallel=options.sequence_parallel,
            use_distributed_optimizer=options.distributed_optimizer,
            use_remove_padding=options.remove_padding,
            use_dynamic_bsz=False,
            entropy_from_logits_with_chunking=options.entropy_chunk_tokens is not None,
            entropy_from_logits_chunk_size=options.entropy_chunk_tokens or 2048,
            forward_only=not plan.trained,
            # any layout may go on with a checkpoint
            dist_ckpt_optim_fully_reshardable=True,
            # the guard is ours: it skips such an update on all ranks, where Megatron's check stops the run
            override_ddp_config={"check_for_nan_in_grad": False},
            override_transformer_config=_transformer(plan),
            vanilla_mbridge=options.bridge == "mbridge",
            seed=plan.context.seed,
        ),
        "optimizer_config": McoreOptimizerConfig(
            lr=spec.lr,
            weight_decay=spec.weight_decay,
            betas=spec.betas,
            clip_grad=spec.clip_grad or 0.0,
            total_training_steps=plan.training.total_updates,
            # verl passes betas on to its Muon only
            override_optimizer_config={
                "adam_beta1": spec.betas[0],
                "adam_beta2": spec.betas[1],
                "adam_eps": spec.eps,
            },
        ),
        "checkpoint_config": CheckpointConfig(save_contents=contents, load_contents=contents),
    }


def _transformer(plan: Plan[VerlMegatronOptions]) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig."""
    options = plan.options
    fields: dict[str, Any] = {
        # mbridge turns it on with tensor parallelism, whatever verl's engine config says
        "sequence_parallel": options.sequence_parallel,
        # ratios must start at 1
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    if options.activation_checkpointing and plan.trained:
        fields |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if plan.context.deterministic:
        fields["deterministic_mode"] = True
    return fields | options.transformer


def _check_plan(plan: Plan[VerlMegatronOptions], name: str) -> None:
    """Raise BackendError for what these engines, or this use of them, do not do."""
    model, options, world = plan.policy.model, plan.options, plan.context.world
    if model.lora is not None:
        raise BackendError(f"backend {name} trains no adapters (model.lora); use backend: verl-fsdp2")
    if model.init_from is not None:
        raise BackendError(
            f"backend {name} starts from model.path alone, and model.init_from is {str(model.init_from)!r}. Make a "
            "Hugging Face folder of it first (mmrl convert), or use backend: verl-fsdp2"
        )
    block = options.tensor_parallel * options.pipeline_parallel
    if world.size % block:
        raise BackendError(
            f"backend {name}: tensor_parallel {options.tensor_parallel} x pipeline_parallel "
            f"{options.pipeline_parallel} = {block} ranks hold one copy of the model, and the run has {world.size} "
            f"rank{'s' if world.size > 1 else ''}. Start a multiple of {block} ranks (launcher.processes), or choose "
            "sizes whose product divides their number"
        )
    if not bridge_is_here(options.bridge):
        raise BackendError(
            f"backend {name}: bridge: {options.bridge} is not installed. Cure: {BRIDGE_CURES[options.bridge]}"
        )


def _check_rotary(hf_config: Any, options: VerlMegatronOptions, name: str) -> None:
    """mbridge reads the scaling of rotary embeddings where transformers 5 no longer writes it, and goes on without."""
    kind = (getattr(hf_config, "rope_parameters", None) or {}).get("rope_type", "default")
    if options.bridge == "mbridge" and kind != "default":
        raise BackendError(
            f"backend {name}: the model scales its rotary embeddings ({kind}), which mbridge would leave out. Use "
            "bridge: megatron-bridge, or backend: verl-fsdp2"
        )


def _check_import_order(device: str, name: str) -> None:
    early = next((module for module in sys.modules if module.startswith("megatron.core")), None)
    if device == "npu" and early is not None and ADAPTOR not in sys.modules:
        raise BackendError(
            f"backend {name}: {early} was imported before MindSpeed's adaptor, which must come first to change it. "
            "Do not import megatron in a plugin's modules before the backend is set up"
        )


def _check_layout(options: VerlMegatronOptions, name: str) -> None:
    """verl takes the layout that another engine of this process made as it is."""
    from megatron.core import parallel_state

    found = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    if found != (options.tensor_parallel, options.pipeline_parallel):
        raise BackendError(
            f"backend {name}: another backend of this process made Megatron's groups for tensor_parallel {found[0]}, "
            f"pipeline_parallel {found[1]}, and they stay. Use a process for each layout"
        )


def _engine_class(name: str) -> Any:
    with _no_command_line():  # MindSpeed's adaptor reads it
        try:
            import verl.workers.engine.megatron  # noqa: F401
        except ImportError as error:
            raise BackendError(f"backend {name}: verl's Megatron engine cannot be imported: {error}") from error
        return engine_class("megatron")


@contextmanager
def _no_command_line() -> Iterator[None]:
    before = sys.argv
    sys.argv = before[:1]
    try:
        yield
    finally:
        sys.argv = before


def _without_schedule(base: Any) -> Any:
    """verl's engine class whose learning rate the recipe's schedule sets."""

    class Engine(base):  # type: ignore[misc]
        def _build_lr_scheduler(self) -> None:
            """The learning rate is a function of the number of updates, which the guard counts."""

    return Engine
