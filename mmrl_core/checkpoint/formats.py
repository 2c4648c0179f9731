"""Opening a folder of weights, whatever installed format it is of (hook `mmrl_weight_formats`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from mmrl_core.checkpoint.matching import MatchedSource, Wanted
from mmrl_core.contracts import WeightFormat, WeightSource
from mmrl_core.errors import ModelError, PluginError
from mmrl_core.plugins import Found, load_plugins

KIND = "weight format"


def open_weights(
    folder: Path,
    format: str | None = None,  # noqa: A002 -- the word for it everywhere
    *,
    where: str | None = None,
    model: Path | None = None,
    wanted: Sequence[Wanted] | None = None,
) -> WeightSource:
    """The weights in `folder`, to be read one at a time under their Hugging Face names.

    Args:
        format: the format's word; None: the one that recognises the folder.
        where: what named the folder, for errors.
        model: a folder with the model's config.json, for formats that hold none.
        wanted: every tensor of the model: they are found behind any one prefix, and what belongs to an optimizer is
            left out. None: names are as the format has them.

    Raises:
        ModelError: no format or several recognise the folder, it is damaged, or does not hold what is wanted.
        PluginError: no such format is installed.
    """
    where = where or f"weights in {str(folder)!r}"
    word = format or detect_format(folder, where)
    source = load_format(word).open(folder, where=where, model=model)
    return source if wanted is None else MatchedSource(source, wanted)


def load_format(word: str) -> type[WeightFormat]:
    """The class of the format called `word`. Raises PluginError."""
    return cast("type[WeightFormat]", load_plugins().get(KIND, word).load())


def detect_format(folder: Path, where: str) -> str:
    """The word of the one installed format that recognises the folder. Raises ModelError."""
    if not folder.is_dir():
        raise ModelError(f"{where} is no folder of weights: no such folder")
    usable, broken = _usable()
    found = [word.name for word, target in usable if target.detect(folder)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ModelError(f"{where} could be of several formats: {', '.join(found)}; say which one it is")
    known = ", ".join(word.name for word, _ in usable)
    raise ModelError(
        f"{where} is no folder of torch.distributed.checkpoint: it has no file .metadata; nor of any other installed "
        f"weight format ({known}). Give the folder that holds .metadata and *.distcp files, *.safetensors and a "
        "config, or latest_checkpointed_iteration.txt; of a run of mmrl, runs/NAME/checkpoints/step_NNNNNNNN"
        + "".join(f"\n{line}" for line in broken)
    )


def _usable() -> tuple[list[tuple[Found, type[WeightFormat]]], list[str]]:
    """(formats that can be imported, one line for each that cannot)."""
    usable, broken = [], []
    for found in load_plugins().found(KIND):
        try:
            usable.append((found, cast("type[WeightFormat]", found.load())))
        except PluginError as error:
            broken.append(str(error))
    return usable, broken
