"""What the patches of `cpu_patches` put in place. Each function takes what stands there and returns its stand-in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import CodeType, ModuleType
from typing import Any

import torch
from torch import Tensor

_FACTORIES = ("arange", "empty", "empty_like", "full", "ones", "ones_like", "rand", "tensor", "zeros", "zeros_like")
_CPU = torch.device("cpu")
_TYPES = {
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}


class _Overlay(ModuleType):
    """A module with some names of its own, in front of another one."""

    def __init__(self, behind: ModuleType, **names: Any) -> None:
        super().__init__(behind.__name__)
        self.__dict__.update(names)
        self.__dict__["_behind"] = behind

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_behind"], name)


def torch_on_cpu(original: ModuleType) -> ModuleType:
    """`torch` for one of Megatron's modules: its CUDA device is the CPU, and so is its CUDA generator."""

    def rng_state(device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def nothing(*arguments: Any) -> None:
        """Nothing is queued on a CPU, and PyTorch caches no host memory."""

    random = _Overlay(original.cuda.random, get_rng_state=rng_state, set_rng_state=set_rng_state)
    cuda = _Overlay(
        original.cuda,
        current_device=lambda: _CPU,
        synchronize=nothing,
        empty_cache=nothing,
        manual_seed=torch.default_generator.manual_seed,
        get_rng_state=rng_state,
        set_rng_state=set_rng_state,
        random=random,
    )
    factories = {name: _created_on_cpu(getattr(original, name)) for name in _FACTORIES}
    return _Overlay(original, cuda=cuda, **factories)


def read_generator(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The CPU generator's state, in place of a CUDA generator's."""

    def get_rng_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> Tensor:
        assert not graph_safe, "CUDA graphs on a CPU"
        return torch.get_rng_state()

    return get_rng_state


def write_generator(original: Callable[..., None]) -> Callable[..., None]:
    """Sets the CPU generator, in place of a CUDA generator."""

    def set_rng_state(new_state: Tensor, device: Any = None, graph_safe: bool = False) -> None:
        assert not graph_safe, "CUDA graphs on a CPU"
        torch.set_rng_state(new_state)

    return set_rng_state


def only_when_asked(original: Callable[..., None]) -> Callable[..., None]:
    """Quantizes weights to fp8 when there are any, and otherwise nothing."""

    def quantize(model_params: list[Any], *arguments: Any, **options: Any) -> None:
        if model_params:
            original(model_params, *arguments, **options)

    return quantize


def cpu_type_names(code: CodeType) -> CodeType:
    """The same code with the names of CPU tensor types in place of those of CUDA tensor types."""
    replaced = code.replace(co_consts=tuple(_renamed(constant) for constant in code.co_consts))
    assert replaced.co_consts != code.co_consts, f"{code.co_name} names no CUDA tensor type"
    return replaced


def stay_on_cpu(code: CodeType) -> CodeType:
    """The same code with `.cpu()` wherever it said `.cuda()`."""
    assert "cuda" in code.co_names, f"{code.co_name} moves nothing to a CUDA device"
    return code.replace(co_names=tuple("cpu" if name == "cuda" else name for name in code.co_names))


def _renamed(constant: Any) -> Any:
    if isinstance(constant, tuple):
        return tuple(_renamed(item) for item in constant)
    return _TYPES.get(constant, constant) if isinstance(constant, str) else constant


def _created_on_cpu(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(factory)
    def create(*arguments: Any, **options: Any) -> Tensor:
        if str(options.get("device")).startswith("cuda"):
            options["device"] = _CPU
        return factory(*arguments, **options)

    return create
