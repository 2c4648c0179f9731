"""What the installed PyTorch is, in words."""

from __future__ import annotations


def torch_build() -> str:
    """Version, what it was built for, and threads; or why it cannot be imported."""
    try:
        import torch
    except (ImportError, OSError, RuntimeError) as error:
        # OSError: a shared library of the build is missing; RuntimeError: a device's package that torch loads is broken
        return f"cannot be imported: {error}"
    build = "CPU"
    if torch.version.cuda:
        build = f"CUDA {torch.version.cuda}"
    elif torch.version.hip:
        build = f"HIP {torch.version.hip}"
    return f"{torch.__version__} ({build} build, {torch.get_num_threads()} threads)"
