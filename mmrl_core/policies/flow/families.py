"""Which model family reads a folder."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mmrl_core.errors import ModelError, nearest
from mmrl_core.policies.flow.diffusers_folder import INDEX, local_folder, read_json
from mmrl_core.policies.flow.family import Family

if TYPE_CHECKING:
    from mmrl_core.policies.flow.options import FlowOptions

FAMILIES = {
    "flux": "mmrl_core.policies.flow.flux:FluxFamily",
    "sd3": "mmrl_core.policies.flow.sd3:Sd3Family",
    "wan": "mmrl_core.policies.flow.wan:WanFamily",
    "dit": "mmrl_core.policies.flow.dit:DitFamily",
}
"""Where each family's class is; imported when it is chosen."""

PIPELINES = {
    "FluxPipeline": "flux",
    "StableDiffusion3Pipeline": "sd3",
    "WanPipeline": "wan",
    "ClassConditionalDiTPipeline": "dit",
}
"""Families by `_class_name` of model_index.json."""


def choose_family(path: str | Path, options: FlowOptions, dtype: torch.dtype) -> Family:
    """The family that `options.family` names, or that reads the pipeline in `path`: a folder, or a hub id.

    `dtype`: the network's precision of forward and backward. Raises ModelError.
    """
    folder = local_folder(path)
    name = options.family if options.family != "auto" else _by_pipeline(folder)
    module, _, word = FAMILIES[name].partition(":")
    family: type[Family] = getattr(importlib.import_module(module), word)
    return family(folder, options, dtype)


def _by_pipeline(folder: Path) -> str:
    pipeline = read_json(folder / INDEX).get("_class_name")
    if pipeline not in PIPELINES:
        raise ModelError(
            f"{folder / INDEX}: no model family for the pipeline {pipeline!r}.{nearest(str(pipeline), PIPELINES)} "
            f"Known: {', '.join(PIPELINES)}. If the model is one of these under another name, say which with "
            f"model.policy.family: {' | '.join(FAMILIES)}"
        )
    return PIPELINES[pipeline]
