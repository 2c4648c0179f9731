"""Importing megatron-core once, quietly, and on a CPU without what takes most of the time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any


def import_megatron(device: str) -> None:
    """Import what the backend uses of megatron-core. On npu MindSpeed's adaptor must be active before."""
    if device == "cpu":  # advice about CUDA, and names that newer versions of PyTorch will drop
        warnings.filterwarnings("ignore", module=r"megatron\.")
        warnings.filterwarnings("ignore", r"`torch.distributed.\w+` is deprecated", FutureWarning)
    with warnings.catch_warnings(), _uncompiled() if device == "cpu" else nullcontext():
        # that TransformerEngine and Apex are not there is no news: nothing here needs them
        warnings.simplefilter("ignore")
        import megatron.core.distributed
        import megatron.core.models.gpt
        import megatron.core.optimizer
        import megatron.core.pipeline_parallel  # noqa: F401


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Within the block `torch.compile` returns functions as they are.

    Megatron decorates its fused operations with it while it is imported. None of them is used here, but to decorate
    them PyTorch imports its compiler, which takes longer than all the rest.
    """
    import torch

    def as_it_is(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
        return function if function is not None else lambda f: f

    original = torch.compile
    torch.compile = as_it_is  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = original
