"""Pipelines in the diffusers layout: `model_index.json`, and one folder a component. Everything is read from disk."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mmrl_core.errors import ModelError

INDEX = "model_index.json"

_T = TypeVar("_T")

_LIBRARIES = {"diffusers": "torch_dtype", "transformers": "dtype"}
"""Libraries whose classes are loaded, and their word for the precision."""

_UNWANTED = ("*.bin", "*.pt", "*.ckpt", "*.msgpack", "*.onnx*", "*.h5", "*.fp16.*", "*.fp16-*")
"""Files of hub repositories that repeat the weights in another form."""


def local_folder(path: str | Path) -> Path:
    """`path` when it is a folder, else that hub repository's snapshot, downloaded when it is not there yet.

    Of a repository, only the index and the components that it names are fetched. With HF_HUB_OFFLINE the hub's cache is
    used and nothing is fetched. Raises ModelError.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        snapshot = Path(snapshot_download(str(path), allow_patterns=[INDEX]))
        components = [name for name, entry in read_json(snapshot / INDEX).items() if _is_component(entry)]
        wanted = [INDEX, *(f"{name}/*" for name in components)]
        return Path(snapshot_download(str(path), allow_patterns=wanted, ignore_patterns=list(_UNWANTED)))
    except (OSError, ValueError) as error:  # the hub's errors are of these kinds, offline and malformed ids included
        raise ModelError(
            f"model.path {str(path)!r}: no such folder, and no pipeline of the hub by that name could be had: {error}\n"
            "Name a diffusers folder (with model_index.json) or a hub id; a hub id needs the hub to be reachable, or "
            "the repository in the hub's cache when HF_HUB_OFFLINE is set"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelError naming it."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"{file}: no such file; is {file.parent} a complete folder in the diffusers layout?"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file}: holds a {type(value).__name__}, not an object with names")
    return value


def _is_component(entry: Any) -> bool:
    """Whether an entry of the index is a library and a class; `[null, null]` says that there is no such component."""
    return isinstance(entry, list) and len(entry) == 2 and None not in entry


class DiffusersFolder:
    """One pipeline's folder. Raises ModelError naming the file for whatever is missing or not as expected."""

    def __init__(self, path: Path) -> None:
        if importlib.util.find_spec("diffusers") is None:
            raise ModelError(
                f"{path}: models for images and video need diffusers. Cure: pip install 'mmrl-core[diffusion]'"
            )
        self.path = path
        self.index = read_json(path / INDEX)

    def has(self, name: str) -> bool:
        """Whether the index names a component."""
        return _is_component(self.index.get(name))

    def component(self, name: str, *known: str) -> Any:
        """The class of a component, which must be one of `known` (any, when none is given)."""
        where = self.path / INDEX
        if not self.has(name):
            raise ModelError(f"{where}: names no component {name!r}, which this pipeline needs")
        library, word = self.index[name]
        if library not in _LIBRARIES or (known and word not in known):
            raise ModelError(
                f"{where}: {name} is {library}.{word}; this model family knows {' and '.join(known) or 'classes'} "
                f"of {' and '.join(_LIBRARIES)}"
            )
        found = getattr(importlib.import_module(library), word, None)
        if found is None:
            version = importlib.import_module(library).__version__
            raise ModelError(f"{where}: {name} is {library}.{word}, which the installed {library} {version} lacks")
        return found

    def config(self, name: str, *known: str, file: str = "config.json") -> dict[str, Any]:
        """A component's configuration, with its class's defaults for what the file leaves out."""
        parameters = inspect.signature(self.component(name, *known).__init__).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
        return {**defaults, **read_json(self.path / name / file)}

    def model(self, name: str, dtype: torch.dtype, *known: str) -> nn.Module:
        """A component with its weights, on the CPU, dropout off. Weights that the files lack are an error."""
        kind = self.component(name, *known)
        library = self.index[name][0]
        importlib.import_module(f"{library}.utils.logging").disable_progress_bar()
        model, found = self._loading(
            name,
            lambda: kind.from_pretrained(
                str(self.path / name),
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **{_LIBRARIES[library]: dtype},
            ),
        )
        missing = sorted(found["missing_keys"])
        if missing:
            raise ModelError(
                f"{self.path / name}: {len(missing)} weights of {kind.__name__} are in none of its safetensors files, "
                f"the first {missing[0]!r}; is the folder complete, and of this model?"
            )
        assert isinstance(model, nn.Module)
        return model.eval()

    def stored(self, name: str, key: str) -> Tensor:
        """One tensor of a component's files."""
        from safetensors import safe_open

        def read() -> Tensor:
            for file in sorted((self.path / name).glob("*.safetensors")):
                with safe_open(file, framework="pt") as tensors:
                    if key in tensors.keys():  # noqa: SIM118 - not a mapping
                        found: Tensor = tensors.get_tensor(key)
                        return found
            raise KeyError(f"no safetensors file has the tensor {key!r}")

        return self._loading(name, read)

    def tokenizer(self, name: str, *known: str) -> Any:
        """A component that is a tokenizer."""
        kind = self.component(name, *known)
        return self._loading(name, lambda: kind.from_pretrained(str(self.path / name), local_files_only=True))

    def scheduler(self) -> Any:
        """The component `scheduler`, fresh."""
        kind = self.component("scheduler")
        return self._loading("scheduler", lambda: kind.from_pretrained(str(self.path / "scheduler")))

    def _loading(self, name: str, load: Callable[[], _T]) -> _T:
        from safetensors import SafetensorError

        try:
            return load()
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            folder, kind = self.path / name, self.index[name][1]
            hint = "" if folder.is_dir() else " (no such folder)"
            raise ModelError(f"{folder}{hint}: cannot load {kind}: {error}") from error
