"""Whether verl's Megatron and MindSpeed engines can run here. Imports neither torch nor what is looked for."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path

from mmrl_core.errors import PluginError
from mmrl_core.hookspecs import Probe
from mmrl_verl.probe import verl

ADAPTOR = "megatron_adaptor.py"
BRIDGES = {"mbridge": "mbridge", "megatron-bridge": "megatron.bridge"}
"""Word of the option `bridge` -> module."""
BRIDGE_CURES = {
    "mbridge": "pip install 'mbridge[megatron]'",
    "megatron-bridge": 'pip install "megatron-bridge>=0.5.2" in an environment made for it (verl\'s container images)',
}
MINDSPEED_CURE = (
    "git clone https://gitcode.com/Ascend/MindSpeed.git at the branch made for your Megatron, and pip install -e "
    "MindSpeed; the package index has only a placeholder"
)


def megatron() -> Probe:
    """verl, a CUDA device, megatron-core, TransformerEngine and a bridge."""
    return _all([verl, lambda: _device("cuda"), _megatron_core, _transformer_engine, _bridge])


def mindspeed() -> Probe:
    """verl, an NPU, megatron-core, MindSpeed itself and a bridge."""
    return _all([verl, lambda: _device("npu"), _megatron_core, _mindspeed, _bridge])


def bridge_is_here(word: str) -> bool:
    """Whether the bridge that `bridge: WORD` names is installed."""
    return _spec(BRIDGES[word]) is not None


def _all(questions: Sequence[Callable[[], Probe]]) -> Probe:
    """The first answer that is no, in the order in which one would install things; or what was found."""
    found = []
    for question in questions:
        answer = question()
        if not answer.available:
            return answer
        found.append(answer.reason)
    return Probe(available=True, reason=", ".join(found))


def _device(word: str) -> Probe:
    from mmrl_core.plugins import load_plugins

    try:
        answer = load_plugins().get("device", word).probe()
    except PluginError:
        reason = f"it runs on the device {word} alone, and no installed plugin declares that"
        return Probe(available=False, reason=reason, cure=f"pip install mmrl-{word}")
    if answer.available:
        return answer
    reason = f"it runs on the device {word} alone, and {answer.reason}"
    return Probe(available=False, reason=reason, cure=answer.cure)


def _megatron_core() -> Probe:
    if _spec("megatron.core") is None:
        return Probe(available=False, reason="megatron-core is not installed", cure="pip install megatron-core")
    return Probe(available=True, reason=f"megatron-core {_version('megatron-core')}")


def _transformer_engine() -> Probe:
    if _spec("transformer_engine") is None:
        reason = "TransformerEngine is not installed, and both bridges build models from its layers"
        cure = 'pip install --no-build-isolation "transformer-engine[pytorch]"'
        return Probe(available=False, reason=reason, cure=cure)
    return Probe(available=True, reason=f"TransformerEngine {_version('transformer-engine')}")


def _mindspeed() -> Probe:
    spec = _spec("mindspeed")
    if spec is None:
        return Probe(available=False, reason="MindSpeed is not installed", cure=MINDSPEED_CURE)
    if not any((Path(folder) / ADAPTOR).is_file() for folder in spec.submodule_search_locations or []):
        reason = f"mindspeed {_version('mindspeed')} is a placeholder without mindspeed/{ADAPTOR}"
        return Probe(available=False, reason=reason, cure=MINDSPEED_CURE)
    return Probe(available=True, reason=f"MindSpeed {_version('mindspeed')}")


def _bridge() -> Probe:
    found = [word for word in BRIDGES if bridge_is_here(word)]
    if not found:
        reason = f"no bridge from Hugging Face to Megatron is installed ({' or '.join(BRIDGES)})"
        return Probe(available=False, reason=reason, cure=BRIDGE_CURES["mbridge"])
    return Probe(available=True, reason=", ".join(f"{word} {_version(word)}" for word in found))


def _spec(module: str) -> ModuleSpec | None:
    """Where a module is, without importing it (its parents are namespaces)."""
    try:
        return importlib.util.find_spec(module)
    except ModuleNotFoundError:  # its parent is missing
        return None


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
