"""Finding the tensors of a model among those that a checkpoint holds: by name behind one prefix, with their shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mmrl_core.contracts import WeightSource
from mmrl_core.errors import ModelError

KNOWN_PREFIXES = ("", "model.", "module.", "state_dict.", "state.model.", "model.model.", "model.network.")
"""What usually stands before the names; others are found too, unless several would do. The last two are mmrl's."""

SHOWN = 5
"""Names of one kind in an error."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One tensor of a model."""

    names: tuple[str, ...]
    """Hugging Face names; several for a tied weight, of which any may be stored."""
    shape: tuple[int, ...]
    required: bool = True
    """False for buffers: they may be missing."""
    tensor: Tensor | None = field(default=None, compare=False)
    """The module's own, when there is one."""


def wanted_of(module: nn.Module, name_of: Callable[[str], str]) -> list[Wanted]:
    """Every parameter and buffer of a module.

    Args:
        name_of: the Hugging Face name of a parameter or buffer.
    """
    parameters = _by_tensor(module.named_parameters(remove_duplicate=False), name_of)
    buffers = _by_tensor(module.named_buffers(remove_duplicate=False), name_of)
    wanted = [
        Wanted(names=tuple(names), shape=tuple(tensor.shape), required=required, tensor=tensor)
        for kind, required in ((parameters, True), (buffers, False))
        for names, tensor in kind
    ]
    names = Counter(name for w in wanted for name in w.names)
    assert not names or max(names.values()) == 1, f"two tensors of one name: {names.most_common(1)}"
    return wanted


def match(source: WeightSource, wanted: Sequence[Wanted]) -> list[list[str]]:
    """For each of `wanted` the names in `source` that hold it, as the source has them; none for a missing buffer.

    Raises ModelError unless every required tensor is there behind one common prefix with its shape, and nothing else
    is, beside what belongs to an optimizer or stands behind another prefix.
    """
    shapes = {name: source.shape(name) for name in source.names()}
    prefix = _prefix(source.where, wanted, shapes)
    found = [[prefix + name for name in w.names if prefix + name in shapes] for w in wanted]
    _check(source.where, prefix, wanted, found, shapes)
    return found


class MatchedSource(WeightSource):
    """The wanted tensors of another source and no others, under their own names.

    A weight stored under several of its names keeps the first of them: the others must be equal, which is checked when
    it is read. Raises ModelError as `match` does.
    """

    def __init__(self, source: WeightSource, wanted: Sequence[Wanted]) -> None:
        self.source = source
        self.where, self.model_folder = source.where, source.model_folder
        self._stored: dict[str, list[str]] = {}
        for w, names in zip(wanted, match(source, wanted), strict=True):
            if names:
                own = next(name for name in w.names if names[0].endswith(name))
                self._stored[own] = names

    def names(self) -> Sequence[str]:
        """Those of the wanted tensors that are stored."""
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(self._stored[name][0])

    def dtype(self, name: str) -> torch.dtype:
        return self.source.dtype(self._stored[name][0])

    def read(self, name: str) -> Tensor:
        return read_tied(self.source, self._stored[name])


def read_tied(source: WeightSource, names: Sequence[str]) -> Tensor:
    """A weight stored under each of `names`. Raises ModelError when they differ."""
    tensor = source.read(names[0])
    for other in names[1:]:
        if not torch.equal(tensor, source.read(other)):
            raise ModelError(
                f"{source.where}: {names[0]} and {other} differ, but they are one tied weight in the model"
            )
    return tensor


def tensor_bytes(source: WeightSource, name: str) -> int:
    """Bytes of a tensor, without reading it."""
    return torch.Size(source.shape(name)).numel() * source.dtype(name).itemsize


def _by_tensor(named: Iterable[tuple[str, Tensor]], name_of: Callable[[str], str]) -> list[tuple[list[str], Tensor]]:
    found: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in named:
        found.setdefault(id(tensor), ([], tensor))[0].append(name_of(name))
    return list(found.values())


def _prefix(where: str, wanted: Sequence[Wanted], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The prefix behind which most parameters are found; of several equally good ones a known one."""
    owner = {name: i for i, w in enumerate(wanted) if w.required for name in w.names}
    behind: dict[str, set[int]] = {}
    for key in shapes:
        start = 0
        while start >= 0:
            if key[start:] in owner:
                behind.setdefault(key[:start], set()).add(owner[key[start:]])
            start = key.find(".", start) + 1 or -1
    most = max((len(found) for found in behind.values()), default=0)
    best = [prefix for prefix, found in behind.items() if len(found) == most]
    known = [prefix for prefix in KNOWN_PREFIXES if prefix in best]
    if known or not best:
        return known[0] if known else ""
    if len(best) > 1 and most == len(set(owner.values())):
        raise ModelError(
            f"{where} holds the model's weights more than once, behind {', '.join(map(repr, best))}; store the ones to "
            "start from by themselves"
        )
    return min(best, key=len)


def _check(
    where: str,
    prefix: str,
    wanted: Sequence[Wanted],
    found: Sequence[Sequence[str]],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    missing = [w.names[0] for w, names in zip(wanted, found, strict=True) if w.required and not names]
    ours = {name for w in wanted for name in w.names}
    others = ("optimizer.", "optim.") if not prefix else ()
    unexpected = [
        key
        for key in shapes
        if key.startswith(prefix) and key[len(prefix) :] not in ours and not key.startswith(others)
    ]
    wrong = [
        f"{name}: {shapes[name]} in the checkpoint, {w.shape} in the model"
        for w, names in zip(wanted, found, strict=True)
        for name in names
        if shapes[name] != w.shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": wrong}
    lines = [
        f"  {kind} ({len(names)}): {'; '.join(names[:SHOWN])}{'; ...' if len(names) > SHOWN else ''}"
        for kind, names in kinds.items()
        if names
    ]
    if lines:
        at = f" behind the prefix {prefix!r}" if prefix else ""
        raise ModelError(f"{where} does not hold the weights of this model{at}:\n" + "\n".join(lines))
