"""Options of the launchers. Imports no torch."""

from __future__ import annotations

from typing import Literal

from mmrl_core.recipe import Positive, Spec


class LocalOptions(Spec):
    """`launcher: {name: local, ...}`."""

    processes: Positive | Literal["auto"] = 1
    """Ranks to start on this machine. `auto`: one for each accelerator of the recipe's device; 1 on cpu, where one
    rank uses every core."""
    threads_per_process: Positive | None = None
    """Computing threads of a rank. By default PyTorch's own choice for one rank; for several, the cores divided by
    the ranks. The environment variable OMP_NUM_THREADS, when set, comes before that default."""
    environment: Literal["inherit", "device"] = "inherit"
    """`device`: ranks get the variables that the device recommends for the recipe (`mmrl env` prints them), where they
    are not set already. `inherit`: the environment is left alone."""


class TorchrunOptions(Spec):
    """`launcher: torchrun` has no options: torchrun's own command line has them."""
