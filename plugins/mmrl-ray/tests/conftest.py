"""One cluster for the tests of a file: two nodes, two CPUs each."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside the tests, wherever the tests are run

from ray_nodes import RayNode, isolated, wait_for_nodes


@pytest.fixture(scope="module", autouse=True)
def _ray_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A token of these tests' own, and nothing of a cluster that may run here already; later files get theirs back."""
    saved = dict(os.environ)
    own = isolated(tmp_path_factory.mktemp("ray") / "token")
    os.environ.clear()
    os.environ |= own
    yield
    os.environ.clear()
    os.environ |= saved


@pytest.fixture(scope="module")
def head(_ray_environment: None) -> Iterator[RayNode]:
    # a dead node is known in 5 s
    with RayNode(cpus=2, environment={"RAY_health_check_period_ms": "1000"}) as node:
        yield node


@pytest.fixture(scope="module")
def cluster(head: RayNode) -> Iterator[str]:
    """The address of the cluster of two nodes."""
    with RayNode(cpus=2, join=head.address):
        wait_for_nodes(head.address, 2)
        yield head.address
