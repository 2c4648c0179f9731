"""The modules beside the tests are importable by them, wherever the tests are run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import hpsv2_tiny


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hpsv2_tiny.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def state() -> hpsv2_tiny.State:
    """Parameters of the tiny network, in fp32."""
    return hpsv2_tiny.parameters()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, state: hpsv2_tiny.State) -> Path:
    return hpsv2_tiny.write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "HPS_tiny_compressed.pt", state)
