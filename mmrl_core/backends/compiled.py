"""Compiling parts of a network with `torch.compile`: what cannot be compiled is an error, never run uncompiled.

Blocks rather than the whole network ("regional compilation"): blocks of one class are compiled once, in seconds, and
what surrounds them (hooks that gather weights, activation checkpointing) stays as it is. Where there are no such hooks,
a network compiled as a whole spares the steps between blocks.
"""

from __future__ import annotations

import functools
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmrl_core.contracts import Policy
from mmrl_core.errors import BackendError

MOST_SHAPES = 64
"""Compilations of one part; every number of rows is one, with and without gradient."""

_OFF = "Set backend.compile: none"


def refuse_unless_compilable(policy: Policy, device: torch.device) -> None:
    """Raises BackendError, with what to do, when this policy's network cannot be compiled for this device here."""
    import torch._dynamo
    import torch._inductor.codegen.common as inductor

    if not policy.steady_shapes:
        raise BackendError(
            f"backend.compile: inputs of the policy {policy.model.policy.name} have other lengths in every "
            f"step, and it would be compiled again for each. {_OFF}"
        )
    dynamo: Any = torch._dynamo.config
    for name, variable in (("disable", "TORCHDYNAMO_DISABLE"), ("suppress_errors", "TORCHDYNAMO_SUPPRESS_ERRORS")):
        if getattr(dynamo, name):
            raise BackendError(
                f"backend.compile: torch._dynamo.config.{name} is set ({variable} in the environment?), with "
                f"which nothing, or not everything, is compiled. Unset it, or set backend.compile: none"
            )
    inductor.init_backend_registration()
    if inductor.get_scheduling_for_device(device.type) is None:
        raise BackendError(
            f"backend.compile: torch.compile's compiler (inductor) of PyTorch {torch.__version__} knows no "
            f"device {device.type}. {_OFF}"
        )
    problem = _missing_on_host() if device.type == "cpu" else _missing_triton(device)
    if problem:
        raise BackendError(f"backend.compile: {problem}, or set backend.compile: none")


def _missing_triton(device: torch.device) -> str | None:
    """That inductor lacks Triton, where it compiles with that, with the cure."""
    from torch._inductor.utils import is_gpu
    from torch.utils._triton import has_triton

    if not is_gpu(device.type) or has_triton():
        return None
    return f"Triton is not installed, or does not support {device}. Install it: pip install triton"


def _missing_on_host() -> str | None:
    """What inductor lacks to compile for the host's cores, with its cure."""
    from torch._inductor import cpp_builder, exc

    try:
        compiler = cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        return f"no C++ compiler was found ({str(error).splitlines()[0]}). Install one: apt install g++"
    if shutil.which(compiler) is None:
        return f"the C++ compiler {compiler} was not found. Install one: apt install g++"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        return f"{header} is missing. Install Python's headers: apt install python3-dev"
    return None


def compile_units(units: Sequence[nn.Module]) -> None:
    """Compile the forward of each unit in place: names of weights, hooks and classes stay.

    Compilation happens at the first forward of each shape. Shapes are static: the code for a shape is then the same in
    every process, whatever it has seen before, without which a resumed run would not be the undisturbed one bit for
    bit.
    """
    import torch._dynamo

    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, MOST_SHAPES)
    for unit in units:
        unit.forward = _compiled(unit.forward)


def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` compiled as a whole (`fullgraph`): what cannot be, or too many shapes, is an error.

    Roundings to bf16 between operations are kept (`emulate_precision_casts`). Forwards with and without gradient, whose
    operations are fused differently, would else differ by more than a clip range of 1e-4 allows.
    """
    from torch._dynamo import exc

    compiled = torch.compile(forward, fullgraph=True, dynamic=False, options={"emulate_precision_casts": True})

    @functools.wraps(forward)
    def run(*arguments: Any, **named: Any) -> Any:
        try:
            return compiled(*arguments, **named)
        except exc.FailOnRecompileLimitHit as error:
            raise BackendError(
                f"backend.compile: {forward.__qualname__} was compiled for {MOST_SHAPES} different shapes and met "
                "another one. Keep the number of rows the same (backend.micro_batch_samples, rollout.max_rows), or set "
                "backend.compile: none"
            ) from error
        except exc.TorchDynamoException as error:
            raise BackendError(
                f"backend.compile: {forward.__qualname__} cannot be compiled: {error}\n{_OFF}"
            ) from error

    return run
