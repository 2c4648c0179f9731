"""Tiny pipelines of the policy `flow`, written once a session, and the families that read them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`pipeline_folder(family, scheduler="euler")`: shared and read only."""
    from mmrl_core.testing.tiny_pipelines import tiny_pipeline

    root, written = tmp_path_factory.mktemp("pipelines"), {}

    def get(family: Any, scheduler: Any = "euler") -> Path:
        key = f"{family}-{scheduler}"
        if key not in written:
            written[key] = tiny_pipeline(root / key, family, scheduler=scheduler)
        return written[key]

    return get


@pytest.fixture
def own_folder(pipeline_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """The same, as a copy that the test may break."""

    def get(family: str, scheduler: str = "euler") -> Path:
        return Path(shutil.copytree(pipeline_folder(family, scheduler), tmp_path / f"{family}-{scheduler}"))

    return get


@pytest.fixture(scope="session")
def prepared() -> Callable[..., Any]:
    """`prepared(folder, dtype=torch.float32, **options)`: the folder's family, ready."""
    import torch

    from mmrl_core.policies.flow.families import choose_family
    from mmrl_core.policies.flow.options import FlowOptions

    def get(folder: Path | str, dtype: Any = torch.float32, **options: Any) -> Any:
        family = choose_family(folder, FlowOptions(**{"max_text_tokens": 24, **options}), dtype)
        family.prepare()
        return family

    return get


@pytest.fixture(scope="session")
def diffusers_pipeline() -> Callable[..., Any]:
    """`diffusers_pipeline(folder, **settings)`: what diffusers makes of the folder."""
    import diffusers

    diffusers.utils.logging.disable_progress_bar()

    def get(folder: Path, **settings: Any) -> Any:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **settings)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return get
