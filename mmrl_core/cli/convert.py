"""`mmrl convert`. Imports nothing heavy until it runs."""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from mmrl_core.errors import MmrlError, ModelError, PluginError
from mmrl_core.plugins import Found, import_string, load_plugins

KIND = "weight format"

M_MMAP_THRESHOLD = -3
"""glibc's number for it, in malloc.h."""

DESCRIPTION = (
    "Write the weights in SOURCE, of any installed format, into TARGET in another one. Nothing is overwritten, and "
    "nothing half-written remains. Digests of all tensors are stored beside them."
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command. The target formats' own options become flags."""
    parser = subparsers.add_parser("convert", help="weights from one format to another", description=DESCRIPTION)
    parser.add_argument("source", metavar="SOURCE", help="the folder to read, or mmrl:NAME")
    parser.add_argument("target", metavar="TARGET", type=Path, help="the folder to write, which must not exist")
    found = load_plugins().found(KIND)
    words = sorted({f.name for f in found})
    parser.add_argument("--to", required=True, metavar="FORMAT", help=f"format to write: {', '.join(words)}")
    parser.add_argument("--from", dest="source_format", metavar="FORMAT", help="format of SOURCE; recognised otherwise")
    parser.add_argument(
        "--model",
        metavar="FOLDER",
        help="Hugging Face folder (or mmrl:NAME) with the config and tokenizer, when SOURCE does not come with them",
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of floating-point weights in TARGET; as they are"
    )
    parser.add_argument("--verify", action="store_true", help="read TARGET again and compare every tensor with SOURCE")
    for flag, (formats, meaning) in _flags(found).items():
        group = ", ".join(formats)
        parser.add_argument(
            flag, dest=f"option{flag}", metavar="VALUE", default=argparse.SUPPRESS, help=f"{group}: {meaning}"
        )
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Convert, and print what was written. Raises ModelError or PluginError."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    options = _options(arguments)
    _keep_no_freed_memory()

    import torch

    from mmrl_core.checkpoint.conversion import Conversion, convert
    from mmrl_core.packaged_models import local_path

    job = Conversion(
        source=Path(local_path(arguments.source)),
        target=arguments.target,
        source_format=arguments.source_format,
        target_format=arguments.to,
        options=options,
        model=None if arguments.model is None else Path(local_path(arguments.model)),
        dtype=None if arguments.dtype is None else getattr(torch, arguments.dtype),
        verify=arguments.verify,
    )
    started = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("checking", total=None)

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        made = convert(job, show)
    seconds = time.monotonic() - started
    print(
        f"{job.target}: {made.tensors} tensors, {made.bytes / 2**30:.2f} GiB, {made.source_format} -> {arguments.to} "
        f"in {seconds:.1f} s{', verified' if job.verify else ''}"
    )
    return 0


def _keep_no_freed_memory() -> None:
    """Let glibc return a tensor's memory when it is freed.

    It raises the size from which it does (M_MMAP_THRESHOLD) with every large block that is freed, up to 32 MiB, and
    then keeps most of what a conversion streams through (726 MB for a model of 700 MB; 284 MB so). Other C libraries
    need no telling.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 20)


# ----------------------------------------------------------------------------------------------- the formats' options


def _model_of(found: Found) -> type[BaseModel] | None:
    dotted = found.component.options
    if dotted is None:
        return None
    model: type[BaseModel] = import_string(dotted, f"options of weight format {found.name!r}")
    return model


def _flags(formats: list[Found]) -> dict[str, tuple[list[str], str]]:
    """Flag -> (the formats that have it, its meaning)."""
    flags: dict[str, tuple[list[str], str]] = {}
    for found in formats:
        try:
            model = _model_of(found)
        except PluginError:
            continue  # said when this format is asked for
        for name, field in model.model_fields.items() if model else ():
            default = field.get_default(call_default_factory=True)
            meaning = " ".join((field.description or "").split())
            shown = meaning if default is None else f"{meaning} Default: {default}."
            flags.setdefault("--" + name.replace("_", "-"), ([], shown))[0].append(found.name)
    return flags


def _options(arguments: argparse.Namespace) -> Any:
    """The target format's options out of the flags. Raises ModelError for what it does not take."""
    found = load_plugins().get(KIND, arguments.to)
    model = _model_of(found)
    given = {key.removeprefix("option"): text for key, text in vars(arguments).items() if key.startswith("option--")}
    names = {"--" + name.replace("_", "-"): name for name in (model.model_fields if model else ())}
    for flag in given:
        if flag not in names:
            takes = ", ".join(names) or "no options"
            raise ModelError(f"{flag} is not an option of the format {arguments.to}, which takes: {takes}")
    if model is None:
        return None
    values = {names[flag]: _value(model, names[flag], text) for flag, text in given.items()}
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [_problem(e, given) for e in error.errors()]
        raise _Usage("\n".join(lines)) from error


class _Usage(MmrlError):
    """Wrong arguments, with the exit status that they have everywhere."""

    exit_code = 2


def _value(model: type[BaseModel], name: str, text: str) -> Any:
    """A flag's text as YAML would have it; commas make a list where the option is one."""
    annotation = model.model_fields[name].annotation
    kinds = [annotation, *get_args(annotation)]
    if any(get_origin(kind) is list for kind in kinds) and not text.startswith("["):
        text = f"[{text}]"
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _problem(error: Mapping[str, Any], given: Mapping[str, str]) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    if not error["loc"]:
        return message
    flag = "--" + str(error["loc"][0]).replace("_", "-")
    return f"{flag} {given.get(flag, '')}: {message}"
