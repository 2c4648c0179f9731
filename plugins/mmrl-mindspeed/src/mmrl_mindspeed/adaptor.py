"""Activating MindSpeed, which makes megatron-core run on Ascend: by importing its adaptor, before Megatron.

The adaptor changes Megatron and PyTorch (`torch.cuda` becomes the NPU) for the rest of the process: there is no way
back, so a process activates it once. It reads its options from the command line; here they come from the recipe, and
the command line is put aside while it does. Imports neither torch nor mindspeed nor megatron by itself.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from packaging.version import Version

from mmrl_core.errors import BackendError, nearest
from mmrl_mindspeed.cpu_patches import check_version

if TYPE_CHECKING:
    from mmrl_mindspeed.options import MegatronOptions

log = logging.getLogger("mmrl.mindspeed")

ADAPTOR = "mindspeed.megatron_adaptor"
CURE = (
    "The package index holds only a placeholder called mindspeed; install MindSpeed from its repository, at the branch "
    "made for your Megatron: git clone -b 2.3.0_core_r0.12.1 https://gitcode.com/Ascend/MindSpeed.git && "
    'pip install -e MindSpeed, with "megatron-core==0.12.1"'
)

_active: tuple[str, ...] | None = None
"""The options that this process activated MindSpeed with."""


@dataclass(frozen=True, kw_only=True)
class MindSpeed:
    """What is installed under the name `mindspeed`."""

    kind: Literal["missing", "placeholder", "real"]
    version: str | None = None
    """None: no distribution says (a source tree on PYTHONPATH)."""
    where: Path | None = None

    def __str__(self) -> str:
        if self.kind == "missing":
            return "MindSpeed is not installed"
        version = self.version or "of unknown version"
        if self.kind == "placeholder":
            return f"mindspeed {version} is a placeholder without {ADAPTOR}"
        return f"MindSpeed {version} in {self.where}"


def installed() -> MindSpeed:
    """Looks at the files only; nothing of MindSpeed is imported."""
    try:
        version = importlib.metadata.version("mindspeed")
    except importlib.metadata.PackageNotFoundError:
        version = None
    spec = importlib.util.find_spec("mindspeed")
    folders = [Path(p) for p in (spec.submodule_search_locations or [])] if spec is not None else []
    for folder in folders:
        if (folder / "megatron_adaptor.py").is_file():
            return MindSpeed(kind="real", version=version, where=folder)
    if spec is None and version is None:
        return MindSpeed(kind="missing")
    return MindSpeed(kind="placeholder", version=version, where=folders[0] if folders else None)


def activate(device: str, options: MegatronOptions) -> bool:
    """Activate MindSpeed when `device` is `npu`; returns whether it is active. Elsewhere nothing happens.

    Raises BackendError when MindSpeed is missing or a placeholder, does not fit megatron-core, was activated by
    somebody else or with other options, or comes too late because Megatron was imported before.
    """
    global _active
    if device != "npu":
        return False
    words = arguments(options)
    if _active is not None:
        if words != _active:
            raise BackendError(
                f"backend megatron: MindSpeed is active in this process with {' '.join(_active)} and cannot change to "
                f"{' '.join(words)}. Use a process for each run"
            )
        return True
    _check()
    with _command_line(words):
        importlib.import_module(ADAPTOR)
    _active = words
    _warn_unknown(options.mindspeed)
    log.info("activated %s with %s", installed(), " ".join(words))
    return True


def arguments(options: MegatronOptions) -> tuple[str, ...]:
    """MindSpeed's command line: the layout under Megatron's names, then the recipe's `mindspeed` options."""
    layout: dict[str, Any] = {
        "tensor_model_parallel_size": options.tensor_parallel,
        "pipeline_model_parallel_size": options.pipeline_parallel,
        "context_parallel_size": options.context_parallel,
        "sequence_parallel": options.sequence_parallel,
        "use_distributed_optimizer": options.distributed_optimizer,
        "variable_seq_lengths": True,
    }
    clash = sorted(set(layout) & set(options.mindspeed))
    if clash:
        raise BackendError(
            f"backend megatron: mindspeed.{clash[0]} follows from the backend's own options; leave it out of mindspeed"
        )
    return tuple(_words({**layout, **options.mindspeed}))


def _words(values: Mapping[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        if value is None or value is False:
            continue
        yield f"--{name.replace('_', '-')}"
        if isinstance(value, list):
            yield from map(str, value)
        elif value is not True:
            yield str(value)


def _check() -> None:
    megatron = check_version()
    found = installed()
    if found.kind != "real":
        raise BackendError(f"backend megatron on npu needs MindSpeed, and {found}. {CURE}")
    if importlib.util.find_spec("torch_npu") is None:
        raise BackendError(
            f"backend megatron on npu: {found} needs torch_npu, which is not installed. Cure: pip install torch_npu "
            "in the version made for your torch"
        )
    if found.version is None:
        log.warning("%s: cannot check that it was made for megatron-core %s", found, megatron)
    elif Version(found.version).release[:2] != Version(megatron).release[:2]:
        raise BackendError(
            f"backend megatron: {found} was made for megatron-core {'.'.join(found.version.split('.')[:2])}, but "
            f"megatron-core {megatron} is installed. {CURE}"
        )
    if ADAPTOR in sys.modules:
        raise BackendError(
            f"backend megatron: {ADAPTOR} was imported before, by other code of this process, with options that mmrl "
            "does not know. Do not import it in a plugin; the backend does"
        )
    early = next((name for name in sys.modules if name.startswith("megatron.core")), None)
    if early is not None:
        raise BackendError(
            f"backend megatron: {early} was imported before MindSpeed's adaptor, which must come first to change it. "
            "Do not import megatron in a plugin's modules before the backend is set up"
        )


@contextmanager
def _command_line(words: Sequence[str]) -> Iterator[None]:
    before = sys.argv
    sys.argv = [before[0] if before else "mmrl", *words]
    try:
        yield
    finally:
        sys.argv = before


def _warn_unknown(options: Mapping[str, Any]) -> None:
    """MindSpeed takes any word without complaint: say which of the recipe's it does not declare."""
    parser = importlib.import_module("mindspeed.args_utils")
    known = set(vars(parser.get_mindspeed_args(get_defaults=True)))
    for name in sorted(set(options) - known):
        log.warning(
            "mindspeed.%s is no option of MindSpeed itself; passed on, for it also reads some of Megatron's.%s",
            name,
            nearest(name, known),
        )
