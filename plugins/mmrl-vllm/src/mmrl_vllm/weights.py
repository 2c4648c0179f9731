"""New weights on their way into vLLM: what the model is made of, tied names included, in a stream that is checked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmrl_core.contracts import Bucket
from mmrl_core.errors import RolloutError

if TYPE_CHECKING:
    from mmrl_core.recipe import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Names:
    """The names of a model's weights."""

    own: frozenset[str]
    """One name of every parameter."""
    aliases: dict[str, tuple[str, ...]]
    """Further names of a tied parameter, by its name in `own`: `lm_head.weight` of the embedding."""


def names_of(spec: ModelSpec) -> Names:
    """Hugging Face names of the model's parameters, from its config alone; no memory is taken."""
    from transformers import AutoModelForCausalLM

    from mmrl_core.text.model_folder import load_config

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(load_config(spec), trust_remote_code=spec.trust_remote_code)
    first: dict[int, str] = {}
    aliases: dict[str, tuple[str, ...]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            aliases[known] = (*aliases.get(known, ()), name)
    return Names(own=frozenset(first.values()), aliases=aliases)


class CheckedStream:
    """Iterates (name, tensor) of buckets, each tied weight under all of its names, holding one bucket at a time.

    vLLM keeps what it is not given, without an error: a head that is tied to the embedding stays as it was unless
    `lm_head.weight` is passed too, and so does a weight that is left out. Hence `finish`.
    """

    def __init__(self, weights: Iterator[Bucket], names: Names) -> None:
        self._weights = weights
        self._names = names
        self._missing = set(names.own)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for bucket in self._weights:
            given = {name for name, _ in bucket}
            for name, tensor in bucket:
                if name in self._missing:
                    self._missing.remove(name)
                elif not any(name in aliases for aliases in self._names.aliases.values()):
                    raise RolloutError(f"weight {name!r} has no place in vLLM's copy of the model, or came twice")
                yield name, tensor.detach()
                for alias in self._names.aliases.get(name, ()):
                    if alias not in given:
                        yield alias, tensor.detach()

    def finish(self) -> None:
        """Exhaust what is left of the stream. Raises RolloutError when a weight never came."""
        for _ in self:
            pass
        if self._missing:
            raise RolloutError(
                f"the weight stream left out {sorted(self._missing)[:3]} ({len(self._missing)} in all); vLLM would go "
                "on with the old ones"
            )


def release_packed(model: Any) -> None:
    """Drop the packed copies of linear layers that vLLM's CPU kernels compute with; loading makes new ones.

    Otherwise a layer's old and new copies are alive at once, beside the bucket and the unpacked weight: for an
    embedding that is also the head, three times the largest tensor.
    """
    for module in model.modules():
        if "cpu_linear" in vars(module):
            module.cpu_linear = torch.nn.functional.linear
