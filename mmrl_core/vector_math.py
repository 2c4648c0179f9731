"""Makes the first sines of a process as exact as all later ones. Imports no torch."""

from __future__ import annotations

import sys

ELEMENTWISE = (
    *("acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp", "log", "log10", "log2", "sin", "sqrt", "tan"),
    *("tanh", "trunc"),
)
"""The functions of a tensor that PyTorch computes with oneMKL on a CPU."""

_resolved = False


def resolve_vector_math() -> None:
    """Compute every one of ELEMENTWISE once, of one number. Does nothing while this process has not imported torch.

    oneMKL finds a function's kernel at its first call. Where that call comes from several threads at once, as for a
    first table of rotary positions, one of them may get the kernel of lowest accuracy for its part of the tensor:
    cosines were off by 1.5e-4, once in 30 to 300 processes (oneMKL 2024.2, in the wheels of PyTorch 2.10 to 2.13;
    https://github.com/pytorch/pytorch/issues/188792). A first call with one number comes from one thread.
    """
    global _resolved
    torch = sys.modules.get("torch")
    if _resolved or torch is None:
        return
    for dtype in (torch.float32, torch.float64):
        one = torch.full((1,), 0.5, dtype=dtype, device="cpu")
        for name in ELEMENTWISE:
            getattr(one, name)()
    _resolved = True
