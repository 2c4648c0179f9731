"""The conformance kit's launcher checks, on the tests' cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from mmrl_core.testing.launchers import LauncherConformance


class TestRay(LauncherConformance):
    component = "ray"
    options: ClassVar[Mapping[str, Any]] = {"processes": 2}

    @pytest.fixture(autouse=True)
    def _on_the_cluster(self, cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RAY_ADDRESS", cluster)
        monkeypatch.delenv("RAY_AUTH_MODE")  # the token is found all the same
