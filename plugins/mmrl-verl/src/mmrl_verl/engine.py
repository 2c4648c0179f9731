"""Building verl's FSDP2 engine from what a recipe says, with the recipe's optimizer and initial weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmrl_core.backends.optimizer import AdamW
from mmrl_core.checkpoint.initial_weights import load_initial
from mmrl_core.lora import add_adapters
from mmrl_core.text.model_folder import train_padding_row
from mmrl_verl.building import Plan, model_config, quietly
from mmrl_verl.platforms import choose, engine_class

if TYPE_CHECKING:
    from mmrl_verl.options import VerlFsdp2Options

PRECISION = {"float32": "fp32", "bfloat16": "bf16"}
"""verl's words."""


def build(plan: Plan[VerlFsdp2Options]) -> tuple[Any, AdamW | None]:
    """verl's engine, initialised, and the optimizer that steps its parameters (None for the reference). Collective.

    Raises BackendError, or ModelError when the model cannot be loaded.
    """
    choose(plan.context.device.torch_device.type)
    with quietly():
        engine = _engine_type(engine_class("fsdp2"), plan)(**_configs(plan))
        engine.initialize()
    _switch_off_dropout(engine.module)
    # the first use decides which module is the root of the sharding; engines that generate use the layers directly
    with torch.no_grad():
        device = next(engine.module.parameters()).device
        engine.module(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device), use_cache=False)
    return engine, engine.adamw


def _configs(plan: Plan[VerlFsdp2Options]) -> dict[str, Any]:
    """The arguments of verl's engine."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig

    model, options, spec = plan.policy.model, plan.options, plan.training.optimizer
    attention = getattr(plan.policy.options, "attention", "sdpa")
    hf = model_config(
        plan,
        load_tokenizer=False,
        enable_gradient_checkpointing=options.activation_checkpointing and plan.trained,
        override_config={"attn_implementation": attention},
        lora_rank=model.lora.rank if model.lora is not None and plan.trained else 0,
    )
    precision = PRECISION[model.dtype]
    engine = FSDPEngineConfig(
        strategy="fsdp2",
        # fp32 master weights whatever the precision of forward and backward
        model_dtype="fp32",
        mixed_precision={
            "param_dtype": precision,
            "reduce_dtype": PRECISION[options.reduce_dtype],
            "buffer_dtype": "fp32",
        },
        dtype=model.dtype,
        use_remove_padding=options.remove_padding,
        use_dynamic_bsz=False,
        use_torch_compile=options.torch_compile,
        reshard_after_forward=options.reshard_after_forward,
        use_no_sync_for_gradient_accumulation=options.defer_gradient_sync,
        entropy_from_logits_with_chunking=options.entropy_chunk_tokens is not None,
        entropy_from_logits_chunk_size=options.entropy_chunk_tokens or 2048,
        seed=plan.context.seed,
    )
    return {
        "model_config": hf,
        "engine_config": engine,
        # read by verl's checkpoint manager only: the optimizer is ours
        "optimizer_config": FSDPOptimizerConfig(
            lr=spec.lr, clip_grad=spec.clip_grad or 0.0, total_training_steps=plan.training.total_updates
        ),
        "checkpoint_config": CheckpointConfig(),
    }


def _engine_type(base: Any, plan: Plan[VerlFsdp2Options]) -> Any:
    """verl's engine class with the recipe's initial weights, adapters and optimizer in the places verl gives them.

    Its own optimizer decays norms and biases too, has other schedules, and goes on after a gradient that is not finite.
    """
    model = plan.policy.model

    class Engine(base):  # type: ignore[misc]
        adamw: AdamW | None = None

        def _build_module(self) -> nn.Module:
            module: nn.Module = super()._build_module()
            train_padding_row(module)
            held = not any(parameter.is_meta for parameter in module.parameters())
            # verl loads an untied model on the first rank only and sends it to the others
            if model.init_from is not None and held:
                load_initial(module, model.init_from, lambda name: name, model=model.path)
            if not plan.trained:
                module.requires_grad_(False)
            return module

        def _build_lora_module(self, module: nn.Module) -> nn.Module:
            assert model.lora is not None
            # every rank draws the same adapters
            torch.manual_seed(plan.context.seed)
            add_adapters(module, model.lora, task_type="CAUSAL_LM")
            return module

        def _build_optimizer(self, module: nn.Module) -> torch.optim.Optimizer | None:
            if not plan.trained:
                return None
            parameters = [p for p in module.parameters() if p.requires_grad]
            training = plan.training
            self.adamw = AdamW(parameters, training.optimizer, training.total_updates, plan.context.device)
            return self.adamw.torch_optimizer

        def _build_lr_scheduler(self, optimizer: torch.optim.Optimizer | None) -> None:
            """The learning rate is a function of the number of updates, which AdamW counts."""

    return Engine


def _switch_off_dropout(module: nn.Module) -> None:
    """verl trains in train mode, where activation checkpointing works; ratios must start at 1 all the same."""
    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.p = 0.0
        for name in ("attention_dropout", "attn_dropout", "dropout"):
            if isinstance(getattr(child, name, None), float):
                setattr(child, name, 0.0)
