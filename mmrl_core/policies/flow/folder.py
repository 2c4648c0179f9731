"""Writing a trained network into a folder that diffusers and mmrl read like the one it came from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import torch

from mmrl_core.checkpoint.weight_files import replaced_folder, write_weights
from mmrl_core.contracts import Bucket
from mmrl_core.policies.flow.family import Family


def save_folder(directory: Path, weights: Iterable[Bucket], family: Family, dtype: torch.dtype) -> None:
    """The whole pipeline's folder with the trained network in it.

    Everything but the network is hard-linked to the files it came from, or copied where the file system cannot link:
    text encoders and VAE take no room twice. An existing `directory` is replaced when all is written.
    """
    with replaced_folder(directory) as partial:
        for source in sorted(family.folder.rglob("*")):
            relative = source.relative_to(family.folder)
            hidden = any(part.startswith(".") for part in relative.parts)
            if source.is_dir() or hidden or relative.parts[0] == family.network_folder:
                continue
            target = partial / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(source.resolve(), target)
        network = partial / family.network_folder
        network.mkdir()
        family.save_config(network)
        write_weights(network, chain(weights, [family.fixed_weights()]), dtype, stem="diffusion_pytorch_model")


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links: the copy is as good
        shutil.copy2(source, target)
