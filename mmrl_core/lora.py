"""Low-rank adapters (peft) in any network: injected in place, switched on and off."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from mmrl_core.errors import ModelError

if TYPE_CHECKING:
    from mmrl_core.recipe import LoraSpec


def add_adapters(model: nn.Module, spec: LoraSpec, **facts: Any) -> None:
    """Inject LoRA layers in place and freeze everything else; `facts` go to peft's configuration.

    Raises ModelError without peft, or when the targets match nothing.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ModelError("model.lora needs peft. Cure: pip install 'mmrl-core[lora]'") from error
    targets = spec.target_modules
    if targets == "all-linear" and not hasattr(model, "get_output_embeddings"):
        # peft knows the word for transformers' models only, whose head it leaves out
        targets = [name for name, child in model.named_modules() if isinstance(child, nn.Linear)]
    config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=targets, lora_dropout=spec.dropout, **facts)
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:
        raise ModelError(f"model.lora.target_modules {spec.target_modules!r}: {error}") from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def set_adapters(module: nn.Module, *, enabled: bool) -> None:
    """Switch every LoRA layer below `module` on or off."""
    layers: list[Any] = [child for child in module.modules() if hasattr(child, "lora_A")]
    for layer in layers:
        layer.enable_adapters(enabled)
