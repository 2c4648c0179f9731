"""`PatchConformance`: what `mmrl doctor` and the next user of a library rely on when a plugin declares patches."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pytest

from mmrl_core.hookspecs import Patch
from mmrl_core.patches import apply, verdict
from mmrl_core.plugins import load_plugins

_LISTING = """
import sys
from mmrl_core.plugins import load_plugins
plugins = [p for p in load_plugins().plugins if p.distribution == sys.argv[1]]
assert any(p.patches for p in plugins), "no patches"
print([m for m in ("torch", *sys.argv[2:]) if m in sys.modules])
"""

_ROUND_TRIP = """
import sys
from mmrl_core.testing.patches import check_round_trip
check_round_trip(*sys.argv[1:])
"""


class PatchConformance:
    """Subclass it as `Test...` in your plugin's tests and name your `distribution`."""

    distribution: ClassVar[str]
    """Of the plugin that declares the patches."""
    device: ClassVar[str] = "cpu"
    """The kind of device to apply them for. Nothing runs on it."""
    packages: ClassVar[Sequence[str]] = ()
    """Packages that the patches change, as they are imported: listing must import none of them."""

    @pytest.fixture(scope="class")
    @classmethod
    def fitting(cls) -> list[Patch]:
        """The plugin's patches that apply to what is installed here."""
        plugins = [p for p in load_plugins().plugins if p.distribution == cls.distribution]
        declared = [patch for plugin in plugins for patch in plugin.patches]
        assert declared, f"{cls.distribution} declares no patches (mmrl_patches)"
        fitting = [p for p in declared if verdict(p, cls.device).applies]
        if not fitting:
            pytest.skip("; ".join(f"{p.name}: {verdict(p, cls.device).reason}" for p in declared))
        return fitting

    def test_listing_imports_nothing_heavy(self) -> None:
        """Neither torch nor what is patched."""
        command = [sys.executable, "-c", _LISTING, self.distribution, *self.packages]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "[]"

    def test_every_patch_says_why(self, fitting: list[Patch]) -> None:
        """People read it in `mmrl doctor`."""
        assert all(patch.reason.strip() and patch.targets for patch in fitting)

    def test_every_target_is_changed_and_then_as_before(self, fitting: list[Patch]) -> None:
        """Applied twice is once, and what stood there stands there again. In a fresh process: in this one a backend
        that still lives may hold them."""
        command = [sys.executable, "-c", _ROUND_TRIP, self.distribution, self.device]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr


def check_round_trip(distribution: str, device: str) -> None:
    """Apply and revert the distribution's patches that apply here. Raises AssertionError naming a target."""
    declared = [p for plugin in load_plugins().plugins if plugin.distribution == distribution for p in plugin.patches]
    fitting = [patch for patch in declared if verdict(patch, device).applies]
    before = _standing(fitting)
    first = apply(fitting, device=device)
    during = _standing(fitting)
    same = [target for target in before if during[target] is before[target]]
    assert not same, f"{same[0]} is not changed: its replacement is what stood there"
    with apply(fitting, device=device):
        assert all(value is during[target] for target, value in _standing(fitting).items())
    assert all(value is during[target] for target, value in _standing(fitting).items())
    first.revert()
    left = [target for target, value in _standing(fitting).items() if value is not before[target]]
    assert not left, f"{left[0]} is not what it was"


def _standing(patches: Sequence[Patch]) -> Mapping[str, Any]:
    """What is stored at every target."""
    found: dict[str, Any] = {}
    for target in {t for patch in patches for t in patch.targets}:
        module, _, path = target.partition(":")
        *parents, attribute = path.split(".")
        owner: Any = importlib.import_module(module)
        for part in parents:
            owner = getattr(owner, part)
        found[target] = vars(owner).get(attribute) if isinstance(owner, type) else getattr(owner, attribute)
    return found
