"""Where verl's Megatron and MindSpeed engines cannot run: what `mmrl plugins` and a refused recipe say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mmrl_verl import megatron_probe
from mmrl_verl.megatron_options import VerlMegatronOptions
from pydantic import ValidationError

from mmrl_core.hookspecs import Probe
from mmrl_core.testing.tiny import tiny_language_model, tiny_recipe, write_recipe_file

HERE = Probe(available=True, reason="there")


def package(folder: Path, name: str, *files: str) -> None:
    """An empty package, with empty modules."""
    (folder / name).mkdir(parents=True)
    for file in ("__init__.py", *files):
        (folder / name / file).write_text("")


def told(program: str, *paths: Path) -> str:
    """Standard output of a Python program that finds the packages of `paths` first."""
    places = os.pathsep.join([*map(str, paths), *(entry for entry in sys.path if entry)])
    environment = {**os.environ, "PYTHONPATH": places, "PYTHONNOUSERSITE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("probe", ["megatron", "mindspeed"])
def test_probes_import_nothing_heavy(probe: str) -> None:
    """And here, without an accelerator, they say no, why, and what to do."""
    program = (
        f"import json, sys\nfrom mmrl_verl.megatron_probe import {probe}\nanswer = {probe}()\n"
        "heavy = [m for m in sys.modules if m.split('.')[0] in ('torch', 'verl', 'megatron', 'mindspeed', 'mbridge')]\n"
        "print(json.dumps([answer.available, answer.reason, answer.cure, heavy]))"
    )
    available, reason, cure, heavy = json.loads(told(program))
    assert heavy == []
    if not available:
        assert reason
        assert cure
        device = {"megatron": "cuda", "mindspeed": "npu"}[probe]
        assert f"it runs on the device {device} alone" in reason or "not installed" in reason


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    """A machine that has the device and everything else but these modules."""
    spec = megatron_probe._spec
    monkeypatch.setattr(megatron_probe, "_device", lambda word: HERE)
    present = spec("json")
    monkeypatch.setattr(megatron_probe, "_spec", lambda module: None if module in missing else present)


@pytest.mark.parametrize(
    ("missing", "reason", "cure"),
    [
        (("megatron.core",), "megatron-core is not installed", "pip install megatron-core"),
        (("transformer_engine",), "TransformerEngine is not installed", "transformer-engine[pytorch]"),
        (("mbridge", "megatron.bridge"), "no bridge from Hugging Face to Megatron", "pip install 'mbridge[megatron]'"),
    ],
)
def test_what_verl_megatron_lacks(
    monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...], reason: str, cure: str
) -> None:
    without(monkeypatch, *missing)
    answer = megatron_probe.megatron()
    assert not answer.available
    assert reason in answer.reason
    assert cure in answer.cure


def test_one_bridge_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "megatron.bridge")
    answer = megatron_probe.megatron()
    assert answer.available, answer
    assert "mbridge" in answer.reason


MINDSPEED = "from mmrl_verl import megatron_probe as p\nanswer = p._mindspeed()\nprint(answer.available, answer.reason)"


def test_the_placeholder_is_not_mindspeed(tmp_path: Path) -> None:
    """The package index has a package of that name with nothing in it."""
    package(tmp_path / "placeholder", "mindspeed")
    assert told(MINDSPEED, tmp_path / "placeholder").startswith("False mindspeed of unknown version is a placeholder")
    package(tmp_path / "real", "mindspeed", "megatron_adaptor.py")
    assert told(MINDSPEED, tmp_path / "real").startswith("True MindSpeed")


@pytest.mark.parametrize("backend", ["verl-megatron", "verl-mindspeed"])
def test_a_recipe_is_refused_at_once(tmp_path: Path, backend: str) -> None:
    """One message that names the backend, the reason and the cure, before anything is loaded."""
    device = {"verl-megatron": "cuda", "verl-mindspeed": "npu"}[backend]
    if megatron_probe._device(device).available:
        pytest.skip(f"this machine has the device {device}")
    tiny_language_model(tmp_path / "model")
    recipe = tiny_recipe(tmp_path / "model", tmp_path / "run", backend=backend)
    write_recipe_file(tmp_path / "recipe.yaml", recipe)
    command = [sys.executable, "-m", "mmrl_core.cli.main", "train", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    assert f"backend '{backend}' (mmrl-verl) cannot run here: it runs on the device {device} alone" in done.stderr
    assert "Cure: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sequence_parallel": True}, "tensor_parallel is 1"),
        ({"transformer": {"recompute_granularity": "full"}}, "activation_checkpointing"),
        ({"transformer": {"tensor_model_parallel_size": 2}}, "tensor_parallel"),
        ({"bridge": "auto"}, "megatron-bridge"),
    ],
)
def test_options_that_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        VerlMegatronOptions.model_validate(options)
